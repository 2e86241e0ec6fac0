"""The recipe's training as a process of its own: what it prints is shown and kept, and it is asked to end in time."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from pathlib import Path

from recipes.config import ROOT

ENDED = (143, -signal.SIGTERM)  # saved and ended, or ended before there was anything to save


class TrainingFailed(RuntimeError):
    """Training ended without having trained. The message is one line."""


class Interrupted(RuntimeError):
    """Training was asked to end and has saved; the same command goes on."""


def train(recipe: str, overrides: list[str], log: Path) -> tuple[int, str]:
    """Runs recipes.train; returns its exit status and the last line that it printed. `log` grows by each sitting.

    SIGTERM and Ctrl-C here reach it as SIGTERM, on which it saves; Interrupted is then raised once it has ended.
    """
    command = [sys.executable, "-m", "recipes.train", "--config-name", recipe, *overrides]
    stopped, last = [], ""
    with open(log, "a") as kept:
        kept.write(f"$ {shlex.join(['python', *command[1:]])}\n")
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            start_new_session=True,  # Ctrl-C of the terminal reaches this process alone, which hands it on
        )

        def end(signum, frame):
            stopped.append(signum)
            process.terminate()

        earlier = {signum: signal.signal(signum, end) for signum in (signal.SIGTERM, signal.SIGINT)}
        try:
            for line in process.stdout:
                print(f"   {line}", end="", flush=True)
                kept.write(line)
                kept.flush()
                last = line.strip() or last
            status = process.wait()
        finally:
            for signum, handler in earlier.items():
                signal.signal(signum, handler)
            if process.poll() is None:
                process.terminate()
                process.wait()
    if stopped or status in ENDED:
        raise Interrupted("asked to end; the same command goes on from here")
    return status, last.removeprefix("train.py: ")
