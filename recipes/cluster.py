"""Several processes: who starts them, whether all are there, and that none outlives the first. Imports nothing heavy."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from manifests.schema import write_atomic
from recipes.config import ConfigError

FIRST_PATIENCE = 300.0  # seconds for the first process to settle the folder: a network's file system is slow to tell
PATIENCE = 60.0  # seconds that the other processes have to end by themselves, once training has failed


def start_processes_here(nodes: int, devices: int) -> None:
    """Takes SLURM's variables out of the environment where Lightning is to start the processes of one node itself.

    In an interactive job, or one of a single task, they name one process: Lightning would train with one device on its
    share of the batch, and those that it starts would all take themselves for the first.
    """
    tasks = os.environ.get("SLURM_NTASKS", "1")
    one_of_many = "RANK" in os.environ or tasks.isdigit() and int(tasks) >= devices
    if nodes == 1 and devices > 1 and not one_of_many:
        for name in ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"):
            os.environ.pop(name, None)


def this_start() -> str:
    """What the processes of one start have in common and those of another have not, as torchrun or srun names it.

    Empty where neither has started this process: it is the only one, or the first has started it when it was ready.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")
    elif "SLURM_PROCID" in os.environ:
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    else:
        return ""
    return " ".join(f"{name}={os.environ.get(name, '')}" for name in names)


def say_ready(mark: Path) -> None:
    """Tells the other processes of this start that the first has settled what they would read."""
    if start := this_start():
        write_atomic(mark, start.encode())


def wait_until_ready(mark: Path) -> None:
    """Waits for the first process of this start. Raises ConfigError where it does not come."""
    start, begun, until = this_start(), time.time(), time.monotonic() + FIRST_PATIENCE
    while start and not _says(mark, start, begun - FIRST_PATIENCE):
        if time.monotonic() > until:
            raise ConfigError(
                f"{mark}: the first process of this training has not written it within {FIRST_PATIENCE:.0f} s: it has "
                "ended (read its log), or the nodes do not see the same folder"
            )
        time.sleep(0.2)


def _says(mark: Path, text: str, since: float) -> bool:
    """Whether the mark says so, and was written since: torchrun names its starts alike where it is told an address."""
    try:
        return mark.stat().st_mtime >= since and mark.read_text() == text
    except OSError:  # not there yet, or just replaced
        return False


def check_world(processes: int, wanted: int) -> None:
    """Raises ConfigError where the training has another number of processes than its batches are divided among."""
    if processes != wanted:
        raise ConfigError(
            f"{wanted} devices are configured (trainer.devices, trainer.num_nodes) and {processes} processes are there: "
            "start one task a device (srun --ntasks-per-node, torchrun --nproc-per-node), or configure as many"
        )


@contextmanager
def children_end_with(trainer) -> Iterator[None]:
    """Ends the processes that Lightning has started for the other devices where training ends with an error in this one.

    They would wait half an hour in a collective operation, on GPUs that are not free then. What all agree to end for
    (SIGTERM, divergence) they end for by themselves, and are given time. Lightning's own observer would kill this
    process as soon as it saw one of them end with a status: it is left nothing to see.
    """
    try:
        yield
    except BaseException:
        launcher = getattr(trainer.strategy, "launcher", None)
        processes = getattr(launcher, "procs", [])
        children = list(processes)
        processes.clear()
        _end(children)
        raise


def _end(children: list[subprocess.Popen]) -> None:
    until = time.monotonic() + (PATIENCE if all(child.poll() in (None, 0, 143, 3) for child in children) else 0)
    for child in children:
        try:
            child.wait(max(until - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
