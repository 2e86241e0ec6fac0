"""Refuses a configuration that cannot train, at the start and in one line that names the key.

`compose` needs only Hydra and answers within a second, before NeMo is imported. `check_against_code` compares the
sections with the signatures of what they build: a key that nothing reads is a setting that does nothing.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import os
import sys
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from manifests.shards_format import COMBINED
from recipes.processor import vector_units
from recipes.threads import usable_cores

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
MOST_WORKERS = 12
# Set by train.py itself after the check.
COMPUTED = {"model.train_ds.batch_duration", "model.optim.sched.warmup_steps", "model.optim.sched.min_lr"}


def cpu_precision() -> str:
    """`bf16-mixed` where this CPU multiplies in bfloat16, else `32`."""
    return "bf16-mixed" if vector_units() in ("AMX", "AVX512-BF16") else "32"


def gpu_precision() -> str:
    """bf16-mixed on GPUs that multiply in bfloat16 (Ampere and newer), else 32: older ones imitate it, many times slower.

    Asked of nvidia-smi, as the configuration is composed before torch is imported; the slowest GPU decides.
    """
    from recipes.gpu import asked_of_driver

    capabilities = [float(line) for line in asked_of_driver("compute_cap") if line.replace(".", "", 1).isdigit()]
    return "32" if capabilities and min(capabilities) < 8.0 else "bf16-mixed"


def loader_workers(accelerator: str, devices) -> int:
    """Processes that read audio: 2 beside a CPU, which has the model to compute; the cores of a GPU's process but one."""
    if accelerator == "cpu":
        return 2
    # SLURM's tasks have cores of their own; processes that torchrun or Lightning starts share the machine's, or the task's.
    if "LOCAL_WORLD_SIZE" in os.environ:
        sharing = int(os.environ["LOCAL_WORLD_SIZE"])
    elif "SLURM_PROCID" in os.environ:
        sharing = 1
    else:
        sharing = devices if isinstance(devices, int) else len(devices) if isinstance(devices, ListConfig) else 1
    return max(2, min(MOST_WORKERS, usable_cores() // max(sharing, 1) - 1))


OmegaConf.register_new_resolver("cpu_precision", cpu_precision, replace=True)
OmegaConf.register_new_resolver("gpu_precision", gpu_precision, replace=True)
OmegaConf.register_new_resolver("loader_workers", loader_workers, replace=True)
OmegaConf.register_new_resolver("on_gpu", lambda accelerator, yes, no: no if accelerator == "cpu" else yes, replace=True)
OmegaConf.register_new_resolver("len", lambda items: len(items), replace=True)
OmegaConf.register_new_resolver("at_least", max, replace=True)
OmegaConf.register_new_resolver("at_most", min, replace=True)
OmegaConf.register_new_resolver("middle_block", lambda blocks: max((blocks - 1) // 2, 0), replace=True)  # from 0


WAVEFORM = ("room_probability", "noise_probability")  # of model.noise_and_rooms
DRAWN_ANEW = ("noise_path", "rir_enabled", "lowpass_enabled", "clipping_enabled", "compression_enabled",
              "truncate_duration", "cut_into_windows_duration", "concatenate_samples")  # of model.train_ds, lhotse's

WHOLE, ANY = (int,), (int, float)
NUMBERS = {  # what must be a number, of which kind, and its least value; the rules of `check` say more of some
    "trainer.max_steps": (WHOLE, -1),
    "trainer.num_nodes": (WHOLE, 1),
    "trainer.accumulate_grad_batches": (WHOLE, 1),
    "trainer.log_every_n_steps": (WHOLE, 1),
    "seed": (WHOLE, 0),
    **dict.fromkeys(
        ["training.epochs", "training.validations", "training.global_batch_seconds", "training.warmup_share",
         "training.final_share", "training.weight_decay", "model.optim.lr", "model.tempo", "model.consistency_weight",
         "model.train_ds.min_duration", "model.train_ds.max_duration"], (ANY, 0),
    ),
}


class ConfigError(ValueError):
    """A configuration that cannot train. The message is one line."""


def recipes() -> list[str]:
    """Names of the recipes: the YAML files at the top of conf/ but what they share."""
    return sorted(path.stem for path in CONF.glob("*.yaml") if path.stem != "base")


def suggest(name: str, valid) -> str:
    """', did you mean X?' for the nearest valid name, else the list of all."""
    valid = sorted(map(str, valid))
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; valid: {', '.join(valid)}"


def compose(config_name: str, overrides: list[str], manifests: bool = True) -> DictConfig:
    """The recipe with its overrides, resolved groups and all, checked as far as the YAML alone allows, and for whether
    its `manifests` are there.

    Raises ConfigError for an unknown recipe, group option or key, a missing value or a pair that cannot be.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    name = config_name.removesuffix(".yaml")
    if name not in recipes():
        raise ConfigError(f"no recipe {name!r} in conf{suggest(name, recipes())}")
    with initialize_config_dir(config_dir=str(CONF), version_base="1.2"):
        try:
            parsed = OverridesParser.create().parse_overrides(overrides)
        except HydraException as error:
            raise ConfigError(f"override cannot be read: {one_line(error)}") from None
        groups = {path.name for path in CONF.iterdir() if path.is_dir()}
        for override in parsed:
            key = override.key_or_group
            if key in groups:
                options = [path.stem for path in (CONF / key).glob("*.yaml")]
                values = override.value() if isinstance(override.value(), list) else [override.value()]
                if override.is_sweep_override():
                    raise ConfigError(f"{override.input_line}: one at a time; start a run for each")
                for value in values:
                    if value not in options:
                        raise ConfigError(f"no option {value!r} in {key}{suggest(str(value), options)}")
        by_key = [o for o in parsed if o.key_or_group not in groups and o.key_or_group != "logger@exp_manager"]
        chosen = [o.input_line for o in parsed if o not in by_key]
        base = hydra_compose(name, overrides=[_logger_alias(line) for line in chosen])
        for override in by_key:
            if not (override.is_add() or override.is_force_add() or override.key_or_group.startswith("hydra")):
                _check_key(base, override.key_or_group)
        try:
            cfg = hydra_compose(name, overrides=[_logger_alias(line) for line in overrides])
        except HydraException as error:
            raise ConfigError(one_line(error)) from None
    try:
        check(cfg, manifests)
    except (OmegaConfBaseException, TypeError, AttributeError) as error:
        raise ConfigError(f"the configuration does not hold together: {one_line(error)}") from None
    return cfg


def _logger_alias(line: str) -> str:
    """`logger=wandb` is what a user types; the group lives inside exp_manager."""
    return line.replace("logger=", "logger@exp_manager=", 1) if line.startswith("logger=") else line


def hydra_arguments(arguments: list[str]) -> list[str]:
    return [_logger_alias(argument) for argument in arguments]


def one_line(error: Exception) -> str:
    """Its message without line breaks."""
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())


def _leaves(node: DictConfig, prefix: str = "") -> list[str]:
    """Full names of all values below `node`, whether they can be resolved or not; those of the run before its parts'."""
    names = []
    for key in node.keys():
        child = None if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key) else node[key]
        names += _leaves(child, f"{prefix}{key}.") if isinstance(child, DictConfig) else [f"{prefix}{key}"]
    return sorted(names, key=lambda name: (name.startswith(("size.", "corpus.")), name.count(".")))


def _check_key(cfg: DictConfig, key: str) -> None:
    node, walked = cfg, []
    for part in key.split("."):
        if not isinstance(node, DictConfig):
            return  # inside a list or a value that a later section check looks at
        if part not in node.keys():  # `in` alone is False for a value that is missing
            path = ".".join([*walked, part])
            prefix = ".".join([*walked, ""])
            deeper = [] if walked else [name for name in _leaves(cfg) if name.endswith(f".{key}")]
            near = f"; did you mean {' or '.join(deeper[:3])}?" if deeper else suggest(path, [prefix + str(k) for k in node])
            raise ConfigError(f"unknown key {path}{near} (to add it all the same: +{key}=...)")
        walked.append(part)
        if OmegaConf.is_missing(node, part):
            return
        node = node[part]


def check(cfg: DictConfig, manifests: bool = True) -> None:
    """Missing values and impossible pairs. Raises ConfigError."""
    missing = sorted(key for key in OmegaConf.missing_keys(cfg) if key not in COMPUTED)
    if missing:
        raise ConfigError(f"missing mandatory value: {missing[0]}; give it as {missing[0]}=VALUE")
    if not cfg.model.get("optim"):
        raise ConfigError("model.optim is empty: nothing would be learned; take the override out")
    for key, (kinds, least) in NUMBERS.items():
        value = OmegaConf.select(cfg, key)
        if isinstance(value, bool) or not isinstance(value, kinds) or not value >= least:
            what = "a whole number" if kinds == WHOLE else "a number"
            raise ConfigError(f"{key}={value} must be {what} of {least} or more")
    trainer, train = cfg.trainer, cfg.model.train_ds
    every = trainer.get("val_check_interval")
    cpu = trainer.accelerator == "cpu"
    lhotse = bool(train.get("use_lhotse"))
    shards = bool(train.get("tarred_audio_filepaths") or train.get("shar_path"))
    several = [] if isinstance(train.manifest_filepath, str) else list(train.manifest_filepath or [])
    # lhotse's own augmentations of waveforms: cuts with ids that no later epoch has, or ids that all epochs share.
    chosen_anew = next((f"model.train_ds.{key}" for key in DRAWN_ANEW if train.get(key)), "")
    many = trainer.num_nodes > 1 or (isinstance(trainer.devices, int) and trainer.devices > 1)
    rules = [
        (not cfg.model.get("tokenizer") and not cfg.model.get("labels"), "model.labels is empty: no text could be spelled"),
        (every is not None and (isinstance(every, str) or not every > 0),
         f"trainer.val_check_interval={every} must be a positive number of steps, or null: then training.validations "
         "says how many there are"),
        (not isinstance(cfg.exp_manager.get("explicit_log_dir"), str),
         "exp_manager.explicit_log_dir must be a folder: all that a run makes goes there"),
        (trainer.sync_batchnorm and cpu,
         "trainer.sync_batchnorm=true needs GPUs; set trainer.sync_batchnorm=false with trainer.accelerator=cpu"),
        (trainer.sync_batchnorm and str(cfg.model.encoder.get("_target_")).startswith("recipes."),
         "trainer.sync_batchnorm=true changes nothing here: the encoders of recipes normalise without torch's "
         "BatchNorm, which is what Lightning would synchronise; set it to false"),
        (str(trainer.precision) in {"16", "16-mixed"} and cfg.model.optim.get("fused"),
         f"trainer.precision={trainer.precision} scales the loss up, and model.optim.fused=true scales the gradients "
         "down inside its step only, after they were clipped; set model.optim.fused=false, or "
         "trainer.precision=bf16-mixed"),
        (trainer.use_distributed_sampler and lhotse,
         "trainer.use_distributed_sampler=true fights with lhotse, which shards the data itself; "
         "set trainer.use_distributed_sampler=false"),
        (shards and trainer.max_steps < 1,
         "shards are an endless stream: set trainer.max_steps, now "
         f"{trainer.max_steps}, and an integer trainer.val_check_interval"),
        (shards and train.get("cache_features"),
         "model.train_ds.cache_features=true keeps a whole corpus in memory; set it to false with shards"),
        (train.get("cache_features") and any((cfg.model.get("noise_and_rooms") or {}).get(key, 0) for key in WAVEFORM),
         "model.noise_and_rooms works on waveforms; set model.train_ds.cache_features=false"),
        (train.get("cache_features") and chosen_anew,
         f"model.train_ds.cache_features=true keeps each utterance as it was first drawn, and {chosen_anew} changes it "
         "each time; set cache_features=false"),
        (len(several) > 1 and any(Path(str(path)).name == COMBINED for path in several),
         f"model.train_ds.manifest_filepath: {COMBINED} is one of several; shards are read alone: shard all the "
         "utterances together (python -m manifests.shards)"),
        (shards and isinstance(train.get("shard_seed"), int) and (many or train.num_workers > 1),
         f"model.train_ds.shard_seed={train.get('shard_seed')} makes every device and worker read the same stream of "
         "shards; set model.train_ds.shard_seed=randomized"),
        (shards and many and train.num_workers < 1,
         "model.train_ds.num_workers=0 makes every device read the same stream of shards; set it to 1 or more"),
        (cpu and str(trainer.precision) in {"16", "16-mixed", "16-true", "bf16-true"},
         f"trainer.precision={trainer.precision} does not train on a CPU; use 32 or bf16-mixed"),
        (isinstance(trainer.devices, int) and trainer.devices < (1 if cpu else -1) or trainer.devices == 0,
         f"trainer.devices={trainer.devices} must be 1 or more" + ("" if cpu else ", or -1 for all GPUs")),
        (many and trainer.strategy == "auto" and cpu,
         f"trainer.devices={trainer.devices} on the CPU needs trainer=cpu_ddp"),
        (not 0 <= cfg.training.warmup_share < 1,
         f"training.warmup_share={cfg.training.warmup_share} must be from 0 up to below 1: it is a share of the steps"),
        (not cfg.training.global_batch_seconds > 0,
         f"training.global_batch_seconds={cfg.training.global_batch_seconds} must be positive"),
        (not cfg.model.optim.lr > 0, f"model.optim.lr={cfg.model.optim.lr} must be positive: nothing would be learned"),
        (not 0 <= (cfg.model.get("tempo") or 0) < 0.5,
         f"model.tempo={cfg.model.get('tempo')} must be from 0 to below 0.5"),
        (not 0 <= (cfg.model.get("bpe_dropout") or 0) < 1,
         f"model.bpe_dropout={cfg.model.get('bpe_dropout')} must be from 0 to below 1: it is a share of the merges"),
        (inner_layers_missing(cfg.model), inner_layers_missing(cfg.model)),
        ((trainer.get("max_epochs") or -1) > 0,
         f"trainer.max_epochs={trainer.get('max_epochs')}: a run is counted in steps here, of which a schedule knows the "
         f"last; set training.epochs={trainer.get('max_epochs')}"),
        (not cfg.training.epochs > 0, f"training.epochs={cfg.training.epochs} must be positive"),
    ]
    for broken, message in rules:
        if broken:
            raise ConfigError(message)
    for key in ("train_ds", "validation_ds") if manifests else ():
        paths = cfg.model[key].get("manifest_filepath")
        if key == "train_ds" and shards:
            continue  # a pattern such as manifest__OP_0..240_CL_.json
        for path in [paths] if isinstance(paths, str) else paths or []:
            if isinstance(path, str) and not Path(path).is_file():
                raise ConfigError(
                    f"model.{key}.manifest_filepath: no file {path}; "
                    f"`./run.sh --corpus {cfg.corpus.name} --stop-stage 1` makes it"
                )


def inner_layers_missing(model: DictConfig) -> str:
    """What is wrong with the layers that `model.interctc` asks one of our encoders for; empty where nothing is."""
    asked = list((model.get("interctc") or {}).get("apply_at_layers") or [])
    encoder = model.encoder
    if not asked or not str(encoder.get("_target_")).startswith("recipes."):
        return ""
    layers = encoder.n_layers if "n_layers" in encoder else encoder.get("rnn_layers", 0)  # DeepSpeech leaves none
    if all(0 <= layer < layers for layer in asked):
        return ""
    return f"model.interctc.apply_at_layers={asked}: " + (
        f"this encoder has layers 0 to {layers - 1}" if layers else "this encoder leaves no layers to it"
    ) + "; model.interctc=null goes without"


def check_against_code(cfg: DictConfig) -> None:
    """Every key of a section that builds something must be an argument of what it builds. Raises ConfigError.

    Imports NeMo.
    """
    import hydra.utils
    from lightning.pytorch import Trainer
    from nemo.collections.common.data.lhotse.dataloader import LhotseDataLoadingConfig
    from nemo.core.config.schedulers import SchedulerParams
    from nemo.core.optim.lr_scheduler import AVAILABLE_SCHEDULERS
    from nemo.core.optim.optimizers import AVAILABLE_OPTIMIZERS
    from nemo.utils.exp_manager import CallbackParams, ExpManagerConfig

    def compare(section: str, keys, valid) -> None:
        for key in keys:
            if str(key) not in valid:
                raise ConfigError(f"unknown key {section}.{key}{suggest(str(key), valid)}")

    compare("trainer", cfg.trainer, _arguments(Trainer))
    compare("exp_manager", cfg.exp_manager, ExpManagerConfig.__dataclass_fields__)
    compare("exp_manager.checkpoint_callback_params", cfg.exp_manager.checkpoint_callback_params,
            CallbackParams.__dataclass_fields__)
    if cfg.model.train_ds.get("use_lhotse"):
        ours = {"use_lhotse", "cache_features"}
        compare("model.train_ds", cfg.model.train_ds, {*LhotseDataLoadingConfig.__dataclass_fields__, *ours})
    for section in ("preprocessor", "spec_augment", "noise_and_rooms", "encoder", "decoder"):
        node = cfg.model.get(section)
        if node is None or "_target_" not in node:
            continue
        try:
            built = hydra.utils.get_class(node["_target_"])
        except Exception as error:
            raise ConfigError(f"model.{section}._target_={node['_target_']}: {one_line(error)}") from None
        compare(f"model.{section}", [k for k in node if k != "_target_"], _arguments(built))
    optim = cfg.model.optim
    if optim.name not in AVAILABLE_OPTIMIZERS:
        raise ConfigError(f"model.optim.name={optim.name}{suggest(optim.name, AVAILABLE_OPTIMIZERS)}")
    compare("model.optim", [k for k in optim if k not in ("name", "sched")],
            _arguments(AVAILABLE_OPTIMIZERS[optim.name]))
    if optim.get("sched"):
        if optim.sched.name not in AVAILABLE_SCHEDULERS:
            name = optim.sched.name
            raise ConfigError(f"model.optim.sched.name={name}{suggest(name, AVAILABLE_SCHEDULERS)}")
        scheduler = AVAILABLE_SCHEDULERS[optim.sched.name]
        generic = set(SchedulerParams.__dataclass_fields__) | {"monitor", "reduce_on_plateau", "iters_per_batch"}
        compare("model.optim.sched", [k for k in optim.sched if k != "name"], _arguments(scheduler) | generic)


def _arguments(built) -> set[str]:
    """Names a class takes, with those that it hands on to its bases through **kwargs."""
    names: set[str] = set()
    for base in built.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        parameters = inspect.signature(base.__init__).parameters
        names |= {name for name in parameters if name not in ("self", "args", "kwargs")}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    return names


def main(arguments: list[str] | None = None) -> int:
    """`python -m recipes.config --config-name NAME KEY=VALUE...`: what is wrong with it, before there is any data."""
    parser = argparse.ArgumentParser(prog="python -m recipes.config", description=(main.__doc__ or "").partition(": ")[2])
    parser.add_argument("--config-name", required=True, help="the recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    args = parser.parse_args(arguments)
    try:
        compose(args.config_name, args.overrides, manifests=False)
    except ConfigError as error:
        print(f"run.sh: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
