"""Whether PyTorch can use the GPUs that a run asks for: `python -m recipes.gpu N`, before anything is begun.

A PyTorch built for a newer CUDA than the driver knows sees none, says nothing, and leaves all to the CPU. One without
kernels for an old GPU sees it, and fails at the first product.
"""

from __future__ import annotations

import argparse
import os
import re
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


def visible_gpus() -> int:
    """GPUs that this process may use, without torch, which must not be imported before its threads are set."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return len(asked_of_driver("index"))
    return sum(name.strip() not in ("", "-1") for name in named.split(","))


def has_kernels(capability: tuple[int, int], built_for: list[str]) -> bool:
    """Whether a torch that is `built_for` these runs on a GPU of this compute capability.

    A binary (sm_86) runs within its major number from its minor one on, but sm_90a on 9.0 alone; PTX (compute_90) is
    compiled for all that came later. Where nothing of CUDA is named (ROCm's gfx90a), there is nothing to say.
    """
    found = [re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name) for name in built_for]
    for kind, major, minor, only in (match.groups() for match in found if match):
        built = (int(major), int(minor))
        if capability == built or only != "a" and capability > built and (
            kind == "compute" and not only or capability[0] == built[0]
        ):
            return True
    return not any(found)


def out_of_memory(error: BaseException) -> bool:
    """Whether the GPU or the machine had no memory left; not all of torch's errors of that are of a kind of their own."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("CUDA error: out of memory", "can't allocate memory")
    )


def missing_gpus(wanted: int, elsewhere: bool = False) -> str:
    """One line that says why `wanted` GPUs cannot be used and what to do; empty where they can.

    Of GPUs `elsewhere`, on the nodes of a cluster, only that torch is a build for any.
    """
    import torch

    why = _without_cuda() if elsewhere else _problem(wanted)
    line = f"{wanted} GPU(s) asked for, and torch {torch.__version__} {why}; trainer=cpu (run.sh: --gpus 0) trains without"
    return line if why else ""


def _problem(wanted: int) -> str:
    import torch

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen >= wanted:
        return next(filter(None, map(without_kernels, range(wanted))), "")
    if why := _without_cuda():
        return why
    if seen:
        return f"sees {seen}: give --gpus {seen}"
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return "sees none, hidden by CUDA_VISIBLE_DEVICES (as run.sh --gpus 0 does): unset it"
    return (
        f"is built for CUDA {torch.version.cuda} and sees none (driver {driver_version()}): update the driver, "
        "or put a torch for an older CUDA into requirements-torch.txt"
    )


def _without_cuda() -> str:
    import torch

    if torch.version.cuda or torch.version.hip:
        return ""
    return "is a build without CUDA: run `.venv/bin/python tools/install.py --cuda` where the package index has one with it"


def without_kernels(index: int) -> str:
    """Why this torch computes nothing on a GPU that it sees, after `torch VERSION`; empty where it does."""
    import torch

    capability, built_for = torch.cuda.get_device_capability(index), torch.cuda.get_arch_list()
    if has_kernels(capability, built_for):
        return ""
    version = torch.__version__.partition("+")[0]
    remedy = "it needs a build for a newer CUDA" if capability >= (7, 5) else (
        "GPUs before sm_75 need a build for CUDA 12.6, `.venv/bin/python -m pip install "
        f"torch=={version}+cu126 --index-url https://download.pytorch.org/whl/cu126`"
    )
    return (
        f"has no kernels for sm_{capability[0]}{capability[1]} ({torch.cuda.get_device_name(index)}), only for "
        f"{' '.join(built_for)}: {remedy}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.gpu", description=__doc__)
    parser.add_argument("gpus", type=int, help="how many are asked for")
    parser.add_argument("--elsewhere", action="store_true", help="on other nodes: asks only whether torch's build has CUDA")
    args = parser.parse_args(arguments)
    problem = missing_gpus(args.gpus, args.elsewhere)
    if problem:
        print(f"run.sh: {problem}", file=sys.stderr)
    return 2 if problem else 0


if __name__ == "__main__":
    sys.exit(main())
