"""What a run's folder holds before training goes on in it: an earlier run of the same recipe, or of another one.

NeMo's exp_manager resumes from whatever `-last` checkpoint lies in the folder, under whatever configuration is given.
Here the earlier configuration is held against the new one first, and what a kill may leave of a checkpoint is settled.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import zipfile
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from recipes.config import ConfigError

# What may change between two sittings of one run: where and on what it runs, what it says, where its data lie.
FREE = (
    "trainer", "exp_manager", "corpus", "size", "init_from", "training", "resume_with_changes",
    "model.validation_ds", "model.tokenizer", "model.train_ds.batch_duration", "model.train_ds.manifest_filepath",
    "model.train_ds.num_workers", "model.train_ds.pin_memory", "model.train_ds.cache_features",
)  # fmt: skip
# Of these sections all the same: the data's name, the batch, the plan of the learning rate.
KEPT = ("corpus.name", "training.global_batch_seconds", "trainer.max_steps", "trainer.gradient_clip_val")
OURS = ("*.nemo", "average.json", "report.md", "curve.png")  # results that exp_manager would put aside


def hold(folder: Path):
    """The lock on a run's folder, an open file: free again when it is closed, or when the process ends in any way.

    Two runs in one folder would take each other's checkpoints. Raises ConfigError where another process holds it.
    """
    (folder / ".lock").mkdir(exist_ok=True)  # a folder: exp_manager puts aside all files of an earlier sitting
    lock = open(folder / ".lock" / "process", "a+")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone: workers that outlive it do not hold it
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise ConfigError(
            f"{folder}: another training runs in this folder (process {holder}); wait for it, end it, or choose another "
            "exp_manager.explicit_log_dir"
        ) from None
    except OSError:
        return lock  # a file system without locks
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def last_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that a run in `folder` goes on from, or None."""
    found = sorted((folder / "checkpoints").glob("*last.ckpt"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def settle_checkpoints(folder: Path) -> None:
    """After a kill: one `-last` checkpoint, the newest whole one, and no mark of an unfinished save on it.

    NeMo marks a name unfinished while it saves, but Lightning writes beside it and moves: the file is mostly whole,
    often the one before. exp_manager refuses both a marked one and several. A file cut short (its list of contents is
    at its end) stays marked: exp_manager says so.
    """
    found = sorted((folder / "checkpoints").glob("*last.ckpt"), key=lambda path: path.stat().st_mtime)
    whole = [path for path in found if zipfile.is_zipfile(path)]
    for path in whole[-1:]:
        path.with_name(f"{path.name.removesuffix('.ckpt')}-unfinished").unlink(missing_ok=True)
    for path in whole[:-1]:
        path.unlink()


def steps_done(checkpoint: Path) -> int:
    """Optimizer steps behind a checkpoint of ours (a pickle: load only your own)."""
    import torch

    return int(torch.load(checkpoint, map_location="cpu", weights_only=False, mmap=True)["global_step"])


def changes(before: DictConfig, now: DictConfig) -> list[str]:
    """What makes `now` another run than `before`: `key was A, now B`, those of KEPT first."""
    old, new = _flat(before), _flat(now)
    return [
        f"{key} was {old.get(key, 'not there')}, now {new.get(key, 'not there')}"
        for key in sorted(old.keys() | new.keys(), key=lambda key: (key not in KEPT, key))
        if old.get(key) != new.get(key)
    ]


def refuse_another_run(folder: Path, cfg: DictConfig) -> None:
    """Raises ConfigError where `folder` holds checkpoints of a run with other settings than `cfg`."""
    saved = folder / "config.yaml"
    if cfg.get("resume_with_changes") or not saved.is_file() or last_checkpoint(folder) is None:
        return
    resolved = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    if found := changes(OmegaConf.load(saved), resolved):
        more = f" ({len(found) - 1} more)" if len(found) > 1 else ""
        raise ConfigError(
            f"{folder} holds a run with other settings: {found[0]}{more}; name another folder "
            "(exp_manager.explicit_log_dir=..., with run.sh --exp), remove this one, or go on in it with "
            "resume_with_changes=true"
        )


def put_back(folder: Path) -> None:
    """Results that exp_manager has moved to run_0, run_1, ... on a resume, back into the run's folder."""
    runs = sorted((path for path in folder.glob("run_*") if path.is_dir()), key=lambda path: path.stat().st_mtime)
    for pattern in OURS if runs else ():
        for path in runs[-1].glob(pattern):
            if not (folder / path.name).exists():
                shutil.move(path, folder / path.name)


def _flat(cfg: DictConfig) -> dict[str, str]:
    """Key with dots to value as text, without what is free."""
    found: dict[str, str] = {}

    def walk(node, at: str) -> None:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                walk(value, f"{at}.{key}" if at else str(key))
        elif any(at == key for key in KEPT) or not any(at == key or at.startswith(f"{key}.") for key in FREE):
            found[at] = str(node)

    walk(OmegaConf.to_container(cfg, resolve=True), "")
    return found
