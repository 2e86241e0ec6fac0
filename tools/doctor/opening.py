"""Opens a model: live, from a `.nemo`, from a checkpoint, or built from a configuration. Imports torch and NeMo.

Whatever goes wrong becomes one finding (ModelUnreadable.finding). Weights are read with `weights_only`.
"""

from __future__ import annotations

import copy
import importlib
import re
import zipfile
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException, UnsupportedInterpolationType

from tools.doctor.configs import no_file
from tools.doctor.finding import Finding
from tools.doctor.subject import Subject

NOT_CTC = "model-not-probed"  # of the finding that is no fault: the engine says it as not examined


class ModelUnreadable(Exception):
    """A model that cannot be opened; `finding` says why."""

    def __init__(self, finding: Finding):
        super().__init__(finding.symptom)
        self.finding = finding


def open_model(subject: Subject):
    """probe.Probe around the subject's model. Raises ModelUnreadable, for a transducer or hybrid too."""
    import torch

    from recipes.quiet import quiet_nemo
    from tools.doctor.probe import Probe

    given = subject.given_model
    live = given is not None and not isinstance(given, (str, Path))
    if not live:
        quiet_nemo()
    device = subject.device_wanted
    if device is None and not live:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if live:
        if not isinstance(given, torch.nn.Module) or not hasattr(given, "forward"):
            raise unreadable(f"The model given is a {type(given).__name__}.", "model",
                             ["give an EncDecCTCModel, or the path of a .nemo or checkpoint"])
        if is_transducer(given):
            raise _not_ctc(type(given).__name__)
        return _that_runs(Probe(given, subject, device=device, own=False))
    if subject.device_wanted is not None:
        try:
            torch.zeros(1, device=device)
        except Exception as error:  # torch has no common kind for a device that is not there
            line = " ".join(str(error).split())[:200]
            raise unreadable(f"The device {str(device)!r} cannot be used: {line}.", str(device),
                             ["give cpu or cuda, or leave it out"]) from None
    if given is not None:
        model = restore(Path(given), subject)
    else:
        from tools.doctor.started import open_started

        # What a run started from may be gone since: its model is probed as it is built.
        plain = subject.settings.recipe or subject.run is not None
        model = build(subject.settings) if plain else open_started(subject)
    if is_transducer(model):
        if subject.settings is None:  # a .nemo brings its own, and data and schedule can be examined
            from tools.doctor.configs import Settings

            subject.settings = Settings.of_live(model)
            if not any(subject.manifests.values()):
                subject._open_manifests()
        raise _not_ctc(type(model).__name__)
    return _that_runs(Probe(model, subject, device=device, own=True))


def is_transducer(model) -> bool:
    """Whether a model is a transducer or hybrid: its forward returns encodings, which are no log-probs."""
    import torch

    if not any(isinstance(getattr(model, part, None), torch.nn.Module) for part in ("joint", "ctc_decoder")):
        return False
    from nemo.collections.asr.models import EncDecCTCModel

    return not isinstance(model, EncDecCTCModel)  # somebody's own may have a part of that name


def _not_ctc(name: str) -> ModelUnreadable:
    return not_probed(f"{name} is a transducer or hybrid model: only CTC models are probed")


def not_probed(why: str) -> ModelUnreadable:
    """For a model that is not examined, which is no fault of it."""
    return ModelUnreadable(Finding(NOT_CTC, "note", why, "", {}, [], 1.0))


def _that_runs(probe):
    """The probe, once its model has come through one batch of sound; raises ModelUnreadable where it does not."""
    import torch

    from tools.doctor.probe import untouched

    try:
        with untouched(probe.model), torch.no_grad():
            probe.model.eval()
            audio, lengths = probe.audio_batch(probe.items(2))
            probe.model.forward(input_signal=audio, input_signal_length=lengths)
    except Exception as error:  # whatever anybody's forward raises
        frame = error.__traceback__
        while frame.tb_next is not None and "torch/nn" not in frame.tb_next.tb_frame.f_code.co_filename:
            frame = frame.tb_next
        where = f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}"
        raise does_not_build(
            error, where, "The parts do not fit together: a width, a number of axes or an argument that the next part "
            "does not take.", [f"mend what the message says, at {where}; the widths in question are feat_in, feat_out, "
                               "features and num_classes"], "does not run"
        ) from error
    return probe


def unreadable(symptom: str, where: str, fix: list[str]) -> ModelUnreadable:
    return ModelUnreadable(
        Finding("input-unreadable", "prevents", symptom, "It is not there, is broken, or is not a model of this kind.",
                {}, fix, 1.0, where=where, unreadable=True)
    )


def does_not_build(
    error: BaseException, where: str, cause: str, fix: list[str], what: str = "cannot be built"
) -> ModelUnreadable:
    """The finding for a model that cannot be built, or does not run."""
    line = " ".join(str(error).split())[:400] or "no message"
    return ModelUnreadable(
        Finding("model-does-not-build", "prevents", f"The model {what}: {type(error).__name__}: {line}", cause,
                {"error": f"{type(error).__name__}: {line}"}, fix, 1.0, where=where)
    )


def build(settings):
    """A fresh model from a configuration: our class for our recipes, else NeMo's. Raises ModelUnreadable."""
    if any(settings.get(f"model.{part}") is not None for part in ("joint", "aux_ctc")):
        raise _not_ctc(settings.name)
    import recipes  # noqa: F401  registers our classes with NeMo
    from nemo.collections.asr.models import EncDecCTCModel, EncDecCTCModelBPE

    cfg = copy.deepcopy(settings.cfg)
    try:
        model_cfg = without_data(cfg.model)
        _import_targets(model_cfg)
        if settings.recipe:
            from recipes.ctc_model import CTCModel, CTCModelBPE

            kind = CTCModelBPE if model_cfg.get("tokenizer") else CTCModel
        else:
            kind = EncDecCTCModelBPE if model_cfg.get("tokenizer") else EncDecCTCModel
        OmegaConf.resolve(model_cfg)
        return kind(cfg=model_cfg, trainer=None)
    except UnsupportedInterpolationType as error:
        name = str(error).split("\n")[0].rpartition(" ")[2]
        raise not_probed(f"${{{name}:...}} is resolved by code that is not loaded; pass the live model, or the resolved "
                         "YAML of the run (hparams.yaml)") from error
    except Exception as error:  # whatever anybody's constructor raises
        where, fix = _blame(error, settings)
        fix += [why] if (why := not_composed(settings)) else []
        raise does_not_build(error, where, "The configuration and the code that it names do not fit together.",
                             fix) from error


def not_composed(settings) -> str:
    """What a configuration lacks that has a list `defaults:` of Hydra's, in words; "" where it has none."""
    listed = settings.get("defaults")
    parts = [part for part in OmegaConf.to_container(listed) if part != "_self_"] if isinstance(listed, ListConfig) else []
    if not parts:
        return ""
    names = [part if isinstance(part, str) else ", ".join(f"{key}: {value}" for key, value in part.items()) for part in parts]
    return (f"its list `defaults:` ({'; '.join(names)}) was not composed, what those files say is not known; give the whole: "
            "python SCRIPT.py --cfg job --resolve > whole.yaml")


def without_data(model_cfg: DictConfig) -> DictConfig:
    """The model's section without data sets, which are read by other means, and without values that are missing."""
    whole = OmegaConf.create({"model": model_cfg})
    if model_cfg._get_parent() is not None:  # interpolations reach outside the section
        root = copy.deepcopy(model_cfg._get_root())
        whole = root if "model" in root else whole
    with open_dict(whole):
        for key in ("train_ds", "validation_ds", "test_ds"):
            if key in whole.model:
                whole.model[key] = None
        for key in OmegaConf.missing_keys(whole):  # named from the root
            if key.startswith("model."):
                OmegaConf.update(whole, key, None)
        try:  # what groups of parameters a model makes may hang on the optimizer's name
            OmegaConf.to_container(whole.model.get("optim") or OmegaConf.create(), resolve=True)
        except OmegaConfBaseException:  # it looks into a part of the configuration that is not there
            whole.model.optim = None
    OmegaConf.resolve(whole.model)
    return OmegaConf.create(OmegaConf.to_container(whole.model))


def _import_targets(node) -> None:
    """Imports the packages that `_target_`s name, so that they can register themselves with NeMo."""
    for value in OmegaConf.to_container(node).values():
        if isinstance(value, dict) and isinstance(value.get("_target_"), str):
            try:
                importlib.import_module(value["_target_"].split(".")[0])
            except ImportError:
                continue  # building says so in its own words


def _blame(error: BaseException, settings) -> tuple[str, list[str]]:
    """(configuration key, advice) for an error while building."""
    line = str(error)
    if named := re.search(r"full_key: (\S+)", line):  # omegaconf's own errors
        return settings.key(named[1]), [f"mend the value of {settings.key(named[1])}"]
    for part in ("encoder", "decoder", "preprocessor", "spec_augment", "tokenizer", "decoding"):
        target = str(settings.get(f"model.{part}._target_") or "")
        if target and (target in line or target.rpartition(".")[2] in line):
            return settings.key(f"model.{part}"), [f"mend {settings.key(f'model.{part}')} as the message says"]
    if "UnsafeTarget" in type(error).__name__:
        return settings.key("model"), [
            "import the package and append its name with a dot to nemo.core.classes.common.ALLOWED_TARGET_PREFIXES"]
    if "feat_in" in line or "feat_out" in line:
        return settings.key("model.decoder.feat_in"), ["give the decoder feat_in=null: it is then the encoder's width"]
    return settings.name, ["mend the key or value that the message names"]


def restore(path: Path, subject: Subject):
    """A model from a `.nemo` or a checkpoint. Raises ModelUnreadable."""
    import recipes  # noqa: F401

    if (absent := no_file(path, "model")) is not None:
        raise unreadable(absent, str(path), ["give the path of a .nemo or .ckpt"])
    if (wrong := not_a_model(path)) is not None:
        raise unreadable(f"{path} cannot be restored: {wrong}.", str(path),
                         ["give a complete file written by NeMo or Lightning"])
    try:
        if path.suffix == ".nemo":
            from nemo.collections.asr.models import ASRModel

            model = ASRModel.restore_from(str(path), map_location="cpu")
        else:
            model = _from_checkpoint(path, subject)
    except ModelUnreadable:
        raise
    except Exception as error:  # tar, yaml, pickle, torch: no common kind
        line = " ".join(str(error).split())[:300]
        raise unreadable(f"{path} cannot be restored: {type(error).__name__}: {line}", str(path),
                         ["give a complete file written by NeMo or Lightning; a checkpoint that was cut off while it "
                          "was written is lost, use the one before it"]) from error
    if not all(hasattr(model, part) for part in ("encoder", "decoder", "loss")):
        raise unreadable(f"{path} holds a {type(model).__name__}, which is no CTC model.", str(path),
                         ["give a model with encoder, decoder and CTC loss"])
    return model


def not_a_model(path: Path) -> str | None:
    """Why a file cannot be a `.nemo` or a checkpoint, told from its first bytes; None where it can."""
    try:
        with open(path, "rb") as file:
            begin = file.read(16)
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"
    if not begin:
        return "it is empty"
    # Torch writes zip archives, and long ago pickles; a .nemo is a tar, whose first bytes may be anything.
    if path.suffix != ".nemo" and not begin.startswith((b"PK", b"\x80")):
        return f"it is no file of torch's, it begins with {begin!r}"
    return None


def _from_checkpoint(path: Path, subject: Subject):
    """The model that the configuration (or the checkpoint's own) builds, with the checkpoint's weights."""
    import torch

    from tools.doctor.configs import Settings

    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception:  # Lightning stores the configuration as OmegaConf's classes: allow those and nothing else
        saved = _load_with_config(path)
    weights = saved.get("state_dict", saved) if isinstance(saved, dict) else None
    if not isinstance(weights, dict) or not any(isinstance(v, torch.Tensor) for v in weights.values()):
        raise unreadable(f"{path} holds no state_dict.", str(path), ["give a Lightning checkpoint"])
    settings = subject.settings
    if settings is None or not settings.builds_model:
        own = saved.get("hyper_parameters", {})
        own = own.get("cfg", own) if isinstance(own, dict) or OmegaConf.is_config(own) else {}
        if not (isinstance(own, (dict, DictConfig)) and "encoder" in own):
            raise unreadable(f"{path} does not say how its model is built.", str(path),
                             ["give the configuration too: --config config.yaml"])
        settings = Settings(OmegaConf.create({"model": own}), str(path))
        subject.settings = subject.settings or settings
    model = build(settings)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [key for key in missing if not key.startswith(("preprocessor.", "spec_augmentation.", "loss.", "wer."))]
    if missing:
        raise unreadable(f"{path} lacks {len(missing)} of the model's weights, first {missing[0]}.", str(path),
                         ["give the configuration that the checkpoint was trained with"])
    return model


def _load_with_config(path: Path):
    """A checkpoint whose hyper-parameters are OmegaConf nodes; still weights only, and no classes but configurations'.

    Besides OmegaConf's own, dataclasses and enumerations of NeMo are allowed: they hold values and run nothing.
    """
    import collections
    import dataclasses
    import enum
    import typing

    import omegaconf
    import torch
    from omegaconf import base, nodes

    allowed = [DictConfig, omegaconf.ListConfig, base.ContainerMetadata, base.Metadata, collections.defaultdict, dict,
               list, int, float, str, bool, tuple, typing.Any, type(None)]
    allowed += [kind for kind in vars(nodes).values() if isinstance(kind, type)]
    for _ in range(50):
        try:
            with torch.serialization.safe_globals(allowed):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:  # torch names the first class that it refuses
            named = re.search(r"GLOBAL ((?:nemo|typing)[\w.]*)\.(\w+) was not an allowed", str(error))
            if named is None:
                raise
            kind = getattr(importlib.import_module(named[1]), named[2], None)
            values = dataclasses.is_dataclass(kind) or isinstance(kind, type) and issubclass(kind, enum.Enum)
            if not (values or named[1] == "typing") or kind in allowed:
                raise
            allowed.append(kind)
    raise ValueError("its configuration holds too many classes")
