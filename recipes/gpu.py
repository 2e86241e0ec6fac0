"""Whether PyTorch sees the GPUs that a run asks for: `python -m recipes.gpu N`, before anything is begun.

A PyTorch built for a newer CUDA than the driver knows sees none, says nothing, and leaves all to the CPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from functools import lru_cache


@lru_cache(maxsize=None)
def asked_of_driver(what: str) -> tuple[str, ...]:
    """What nvidia-smi says of each GPU (`driver_version`, `compute_cap`, ...), nothing where it cannot be asked."""
    asked = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    try:
        return tuple(subprocess.run(asked, capture_output=True, text=True, timeout=30).stdout.split())
    except (OSError, subprocess.TimeoutExpired):
        return ()


def driver_version() -> str:
    """The NVIDIA driver's version as nvidia-smi gives it, `unknown` where that cannot be asked."""
    return (*asked_of_driver("driver_version"), "unknown")[0]


def missing_gpus(wanted: int) -> str:
    """One line that says why `wanted` GPUs cannot be used and what to do; empty where they can."""
    import torch

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen >= wanted:
        return ""
    if torch.version.cuda is None:
        why = "is a build without CUDA: remove .venv, and install where the package index offers the CUDA build"
    elif seen:
        why = f"sees {seen}: give --gpus {seen}"
    else:
        why = (
            f"is built for CUDA {torch.version.cuda} and sees none (driver {driver_version()}): update the driver, "
            "or put a torch for an older CUDA into requirements-torch.txt"
        )
    return f"{wanted} GPU(s) asked for, and torch {torch.__version__} {why}; trainer=cpu (run.sh: --gpus 0) trains without"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.gpu", description=__doc__)
    parser.add_argument("gpus", type=int, help="how many are asked for")
    problem = missing_gpus(parser.parse_args(arguments).gpus)
    if problem:
        print(f"run.sh: {problem}", file=sys.stderr)
    return 2 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
