"""Train a recipe: `python recipes/train.py --config-name deepspeech2 corpus=mini trainer=cpu model.optim.lr=5e-4`.

The configuration is composed and checked within a second; only then are torch and NeMo imported. The same
command goes on from the last checkpoint of its experiment folder, or says that training is complete.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

if not __package__:  # started by path: the project's root in place of this folder, whose nemo.py would hide NeMo
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from recipes import cluster
from recipes.config import CONF, COMPUTED, ConfigError, check_against_code, compose, hydra_arguments, one_line, recipes
from recipes.gpu import visible_gpus
from recipes.pretrained import FOLDERS, pretrained_path
from recipes.quiet import quiet_imports, quiet_nemo
from recipes.threads import set_threads

FULL_ERROR = "HYDRA_FULL_ERROR"  # Hydra's own, for tracebacks in place of one line
EXIT_CONFIG, EXIT_DIVERGED, EXIT_ENDED = 2, 3, 143


def main(arguments: list[str] | None = None) -> int:
    """Runs one training; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="recipes/train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-name", "-cn", default="deepspeech2", help=f"recipe: {', '.join(recipes())}")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, KEY=VALUE or GROUP=OPTION")
    parsed = parser.parse_args(arguments)
    name = parsed.config_name.removesuffix(".yaml")
    os.chdir(CONF.parent)  # paths in the YAML files are relative to the root
    try:
        trainer = compose(name, parsed.overrides).trainer
    except ConfigError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return EXIT_CONFIG
    processes = device_count(trainer, visible_gpus)
    cluster.start_processes_here(trainer.num_nodes, processes)
    set_threads(processes)
    quiet_imports()
    from nemo.core.config import hydra_runner

    status: list[int] = []

    def task(cfg):
        status.append(_guarded_fit(cfg))

    # NeMo's runner reads the command line itself, and so do the processes that Lightning starts for DDP.
    sys.argv = [sys.argv[0], "--config-name", name, *hydra_arguments(parsed.overrides)]
    hydra_runner(config_path=str(CONF), config_name=name)(task)()
    return status[0] if status else 1


def _guarded_fit(cfg) -> int:
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from manifests.schema import ManifestError
    from recipes.ctc_model import TrainingDiverged
    from recipes.data import DataError
    from recipes.gpu import out_of_memory

    try:
        fit(cfg)
    except (ConfigError, ManifestError, DataError) as error:
        if os.environ.get(FULL_ERROR) == "1":
            raise
        print(f"train.py: {_one_line(error)} ({FULL_ERROR}=1 shows where)", file=sys.stderr)
        return EXIT_CONFIG
    except TrainingDiverged as error:
        print(f"train.py: {error}", file=sys.stderr)
        return EXIT_DIVERGED
    except SIGTERMException:
        return EXIT_ENDED
    except RuntimeError as error:
        if os.environ.get(FULL_ERROR) == "1" or not out_of_memory(error):
            raise
        from omegaconf import OmegaConf

        seconds = OmegaConf.select(cfg, "model.train_ds.batch_duration", throw_on_missing=False)
        batches = cfg.trainer.accumulate_grad_batches
        print(
            "train.py: out of memory" + (f" with up to {seconds:.0f} s of audio on a device at once" if seconds else "")
            + f": trainer.accumulate_grad_batches={2 * batches} (now {batches}) halves a batch and leaves the global one as it "
            f"is; in validation it is model.validation_ds.batch_seconds ({FULL_ERROR}=1 shows where)", file=sys.stderr,
        )
        return EXIT_CONFIG
    return 0


def _one_line(error: Exception) -> str:
    """Its message in one line; of one that a loader's worker passes on with its traceback, what stands at the end."""
    if "Traceback" not in str(error):
        return one_line(error) or type(error).__name__
    last = str(error).strip().splitlines()[-1].strip()
    return last.partition(f"{type(error).__name__}: ")[2] or last


@contextmanager
def _building() -> Iterator[None]:
    """What the libraries say of settings that they cannot build from, as a ConfigError."""
    from hydra.errors import HydraException
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from manifests.schema import ManifestError

    try:
        yield
    except (ConfigError, ManifestError):
        raise
    except (ValueError, TypeError, KeyError, AttributeError, OSError, HydraException, MisconfigurationException) as error:
        kind = "" if isinstance(error, (ValueError, HydraException, MisconfigurationException)) else f"{type(error).__name__}: "
        raise ConfigError(f"cannot be built: {kind}{_one_line(error)}") from error


def fit(cfg):
    """Builds trainer and model from a composed configuration and trains; returns the model, None where a complete run
    lies in the folder. Raises ConfigError, also where the folder holds a run with other settings."""
    import lightning.pytorch as pl
    import torch
    from nemo.utils.exp_manager import exp_manager
    from nemo.utils.get_rank import is_global_rank_zero
    from omegaconf import OmegaConf, open_dict

    from manifests.schema import write_atomic
    from recipes import resume
    from recipes.gpu import asked_of_driver, missing_gpus
    from recipes.monitor import Progress, SaveLast, WandbMedia
    from tools.doctor.bands import corpus_of
    from tools.doctor.callback import Doctor  # an entry point may attach a monitor of tools

    quiet_nemo()
    with _building():
        check_against_code(cfg)
        with open_dict(cfg):
            left_out = fill_in(cfg, None if cfg.model.get("tokenizer") else cfg.model.labels)
        folder = Path(cfg.exp_manager.explicit_log_dir)
        folder.mkdir(parents=True, exist_ok=True)
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    lock = resume.hold(folder) if is_global_rank_zero() else None  # held until this function returns  # noqa: F841
    if is_global_rank_zero():  # it alone: later it rewrites what the others would read
        if left_out:
            print(left_out, flush=True)
        resume.settle_checkpoints(folder)
        resume.refuse_another_run(folder, cfg)
        cluster.say_ready(folder / ".lock" / "settled")
    else:
        cluster.wait_until_ready(folder / ".lock" / "settled")
    last = resume.last_checkpoint(folder)
    if last is not None and (steps := resume.steps_done(last)) >= cfg.trainer.max_steps:
        if is_global_rank_zero():
            print(f"training is complete: step {steps} of {cfg.trainer.max_steps}", flush=True)
        return None
    progress = Progress(folder, every_n_steps=cfg.trainer.log_every_n_steps)
    corpus = corpus_of(cfg.corpus.name, cfg.model.train_ds.manifest_filepath)
    callbacks = [progress, SaveLast(), WandbMedia(), Doctor(folder=folder, recipe=cfg.name, corpus=corpus)]
    if cfg.exp_manager.create_wandb_logger and not os.environ.get("WANDB_API_KEY") and not _wandb_login():
        os.environ.setdefault("WANDB_MODE", "offline")
    with _building():
        if cfg.trainer.accelerator != "cpu":
            if problem := missing_gpus(device_count(cfg.trainer)):
                raise ConfigError(problem)
            # cuDNN's attention makes a plan for each new shape, and training cannot take it: its mask has a gradient.
            torch.backends.cuda.enable_cudnn_sdp(False)
        trainer = pl.Trainer(**OmegaConf.to_container(cfg.trainer, resolve=True), callbacks=callbacks)
        cluster.check_world(trainer.world_size, device_count(cfg.trainer) * cfg.trainer.num_nodes)
        exp_manager(trainer, OmegaConf.to_container(cfg.exp_manager, resolve=True))
        if trainer.is_global_zero:
            progress.restore()
            resume.put_back(folder)
            write_atomic(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True).encode())
        model = build_model(cfg, trainer)
    if trainer.is_global_zero:
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        print(
            f"{cfg.name} on {cfg.corpus.name}: {parameters:.1f} M parameters, {cfg.trainer.max_steps} steps of "
            f"{cfg.training.global_batch_seconds:g} s of audio over {trainer.world_size} device(s) "
            f"({cfg.trainer.accelerator}, {cfg.trainer.precision}), peak learning rate {cfg.model.optim.lr:g}, outputs in {folder}",
            flush=True,
        )
        if cfg.trainer.accelerator == "cpu" and visible_gpus() and asked_of_driver("index"):
            print("note: this machine has a GPU, and trainer=cpu leaves it alone; trainer=gpu trains on it", flush=True)
    for logger in trainer.loggers:
        if hasattr(logger, "experiment") and type(logger).__name__ == "WandbLogger" and trainer.is_global_zero:
            logger.experiment.config.update(OmegaConf.to_container(cfg, resolve=True), allow_val_change=True)
    with cluster.children_end_with(trainer):
        trainer.fit(model)
    return model


def build_model(cfg, trainer=None):
    """The NeMo model of a recipe: tokens where it has a tokenizer, else characters; weights from `init_from`."""
    from recipes.ctc_model import CTCModel, CTCModelBPE

    model = (CTCModelBPE if cfg.model.get("tokenizer") else CTCModel)(cfg=cfg.model, trainer=trainer)
    if cfg.get("init_from"):
        load_weights(model, cfg.init_from)
    return model


def load_weights(model, path: str) -> None:
    """Weights of a `.nemo` into `model`, all whose name and shape agree; says what did not.

    `path` may be the name of a recipe: its pretrained weights. A stock NeMo Conformer's encoder goes into ours.
    Raises ConfigError where the file is missing or hardly anything of its encoder agrees.
    """
    from nemo.collections.asr.models import ASRModel
    from nemo.collections.asr.modules import ConformerEncoder as NeMoConformer

    from recipes.conformer.encoder import ConformerEncoder
    from recipes.conformer.nemo_weights import swap_encoder

    path = str(pretrained_path(path)) if path in FOLDERS else path
    if not Path(path).is_file():
        raise ConfigError(f"init_from: no file {path}")
    try:
        other = ASRModel.restore_from(path, map_location="cpu")
    except Exception as error:  # tarfile, pickle, hydra, torch: each has kinds of its own
        raise ConfigError(
            f"init_from={path}: cannot be loaded as a NeMo model ({type(error).__name__}: {_one_line(error)})"
        ) from error
    if isinstance(model.encoder, ConformerEncoder) and isinstance(other.encoder, NeMoConformer):
        try:
            swap_encoder(other)
        except ValueError as error:
            raise ConfigError(f"init_from={path}: {error}") from None
    source = other.state_dict()
    target = model.state_dict()
    kept = {key: value for key, value in source.items() if key in target and target[key].shape == value.shape}
    # Of the encoder: features are alike everywhere, decoders often.
    fits, all_of_it = (sum(v.numel() for k, v in s.items() if k.startswith("encoder.")) for s in (kept, target))
    if fits < 0.1 * all_of_it:
        share = f"{fits / max(all_of_it, 1):.0%}"
        raise ConfigError(f"init_from={path}: its weights fit {share} of this model's encoder; is the size the same?")
    model.load_state_dict(kept, strict=False)
    left = sorted(set(target) - set(kept))
    print(f"{len(kept)} of {len(target)} tensors from {path}; fresh: {', '.join(left[:5]) or 'none'}", flush=True)


def fill_in(cfg, labels=None) -> str:
    """Sets what follows from other values: the batch of a device, the number of steps, the schedule in steps.

    One global batch in seconds is the recipe's; the batch of a device is its share. Steps are counted in global
    batches, so neither they nor the learning rate change with the number of devices. Returns what there is to say, empty
    for nothing: utterances too short or too long to be trained on, features that would not fit into the memory. Raises
    what `look_at_data` does.
    """
    from recipes.lengths import split_global_batch

    trainer, train = cfg.trainer, cfg.model.train_ds
    devices = device_count(trainer) * trainer.num_nodes
    train.batch_duration = split_global_batch(
        cfg.training.global_batch_seconds, devices, trainer.accumulate_grad_batches
    )
    if train.batch_duration < 1:
        raise ConfigError(
            f"training.global_batch_seconds={cfg.training.global_batch_seconds} over {devices} devices leaves "
            f"{train.batch_duration:.2f} s for each, less than an utterance; raise it"
        )
    computed, seconds, left_out = trainer.max_steps < 1, 0.0, ""
    if not (train.get("tarred_audio_filepaths") or train.get("shar_path")):  # those are patterns of many files
        seconds, left_out = look_at_data(train, labels)
        if train.get("cache_features"):
            left_out = "\n".join(filter(None, [left_out, bound_cache(cfg, seconds)]))
    if computed:
        steps_a_pass = max(round(seconds / cfg.training.global_batch_seconds), 1)
        trainer.max_steps = max(int(steps_a_pass * cfg.training.epochs), 1)
    if trainer.val_check_interval is None:
        # So spaced that the last validation is after the last step, when the learning rate is lowest.
        count = max(min(int(cfg.training.validations), trainer.max_steps), 1)
        if computed:
            trainer.max_steps -= trainer.max_steps % count
        # A number of steps that was asked for stays: of the counts near the one wanted that which leaves the fewest
        # steps after the last validation, at the lowest learning rates; none where it divides.
        count = min(range(count, (count - 1) // 2, -1), key=lambda n: trainer.max_steps % n)
        trainer.val_check_interval = trainer.max_steps // count
    schedule = cfg.model.optim.sched
    schedule.warmup_steps = max(int(cfg.training.warmup_share * trainer.max_steps), 1)
    schedule.min_lr = cfg.training.final_share * cfg.model.optim.lr
    if isinstance(trainer.val_check_interval, int):  # Lightning counts batches
        steps = min(trainer.val_check_interval, trainer.max_steps)
        trainer.val_check_interval = steps * trainer.accumulate_grad_batches
    return left_out


def bound_cache(cfg, seconds: float) -> str:
    """Turns `cache_features` off where the features of all utterances would take over half of the memory that is free,
    the GPU's or a process's share of the machine's; returns a line that says so, else an empty one.

    Every device comes to hold nearly all of them: an epoch draws anew what it is given.
    """
    import torch

    gpu = cfg.trainer.accelerator != "cpu" and torch.cuda.is_available()
    free = torch.cuda.mem_get_info()[0] if gpu else free_memory() / device_count(cfg.trainer)
    features = cfg.model.preprocessor
    size = seconds / features.window_stride * features.features * 2  # bytes, float16
    if size <= free / 2:
        return ""
    cfg.model.train_ds.cache_features = False
    return (
        f"model.train_ds.cache_features is off: the features of {seconds / 3600:.0f} h take {size / 2**30:.1f} GiB, over half "
        f"of the {free / 2**30:.1f} GiB that {'the GPU' if gpu else 'each process'} has; audio is read anew in each epoch"
    )


def free_memory() -> float:
    """Bytes of memory that are free or can be made so at once, the machine's or the container's or job's (cgroup v2);
    without a limit where nothing says it."""
    def number(path: str, name: str = "") -> float:
        try:
            words = Path(path).read_text().partition(name)[2].split()
            return float(words[0])
        except (OSError, ValueError, IndexError):  # not there, or "max"
            return math.inf

    limit, used = number("/sys/fs/cgroup/memory.max"), number("/sys/fs/cgroup/memory.current")
    machine = 1024 * number("/proc/meminfo", "MemAvailable:")
    return min(machine, limit - used) if math.isfinite(limit) and math.isfinite(used) else machine


def look_at_data(train, labels) -> tuple[float, str]:
    """Seconds of audio that will be trained on, and a line on what will not, by the manifests of `train`.

    Raises ManifestError where a row is not good or has a character that is none of `labels` (None: any will do), and
    ConfigError where nothing is left: lhotse would look for a first batch for ever.
    """
    from manifests.schema import ManifestError, iter_manifest
    from recipes.data import CharEncoder

    paths = [train.manifest_filepath] if isinstance(train.manifest_filepath, str) else list(train.manifest_filepath or [])
    encode = CharEncoder(labels) if labels is not None else len
    durations, spoken = [], 0
    for path in paths:
        for line, row in iter_manifest(path, blank=not train.get("use_lhotse")):
            try:
                spoken += bool(encode(row["text"]))
            except ValueError as error:
                raise ManifestError(f"{path}:{line}: {error}") from None
            durations.append(row["duration"])
    kept = [duration for duration in durations if train.min_duration <= duration <= train.max_duration]
    if paths and not kept:
        raise ConfigError(
            f"{paths}: none of {len(durations)} utterances is from model.train_ds.min_duration={train.min_duration:g} to "
            f"max_duration={train.max_duration:g} s long"
        )
    if paths and not spoken:
        raise ConfigError(f"{paths}: all texts are empty: nothing but silence would be learned")
    if len(kept) == len(durations):
        return sum(kept), ""
    hours = (sum(durations) - sum(kept)) / 3600
    return sum(kept), (
        f"{len(durations) - len(kept)} of {len(durations)} utterances, {hours:.2f} h, are not trained on: shorter than "
        f"model.train_ds.min_duration={train.min_duration:g} s or longer than max_duration={train.max_duration:g} s"
    )


def device_count(trainer, all_gpus: Callable[[], int] | None = None) -> int:
    """Devices of one node: a number, or all GPUs for -1 and auto; these `all_gpus` counts, where torch must not be asked."""
    devices = trainer.devices
    if isinstance(devices, int) and devices > 0:
        return devices
    if isinstance(devices, (list, tuple)) or type(devices).__name__ == "ListConfig":
        return len(devices)
    if trainer.accelerator == "cpu":
        return 1
    if all_gpus is None:
        from torch.cuda import device_count as all_gpus
    return max(all_gpus(), 1)


def _wandb_login() -> bool:
    """Whether a key is stored, as `wandb login` does."""
    netrc = Path.home() / ".netrc"
    return netrc.is_file() and "wandb" in netrc.read_text(errors="ignore")


if __name__ == "__main__":
    sys.exit(main())
