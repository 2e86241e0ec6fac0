"""Fills the virtual environment that runs it: `.venv/bin/python tools/install.py [--cuda]`.

Everything but torch comes from requirements.lock, every version pinned with its hash; torch comes by its version
alone, since its build differs between a CPU and a CUDA machine. Where there is no NVIDIA GPU the CPU build is
preferred, which spares gigabytes; `--cuda` is for a login node or an image, whose GPUs are elsewhere. Standard library
only: nothing is installed yet.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def pip(*arguments: str) -> None:
    """Runs pip of this environment; ends the process with pip's message where it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"installation failed: pip install {' '.join(arguments)}\n{done.stderr.strip()[-2000:]}")


def only(lock: str, name: str) -> str:
    """The entry of one package in a lock, with its hashes."""
    lines = lock.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(name + "=="))
    end = next((i for i in range(start + 1, len(lines)) if not lines[i].startswith(" ")), len(lines))
    return "\n".join(lines[start:end]) + "\n"


def has_gpu() -> bool:
    """Whether an NVIDIA GPU is here, as run.sh asks: a container may have the device and no nvidia-smi."""
    if shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0:
        return True
    return Path("/dev/nvidia0").exists()


def without_cuda() -> bool:
    """Whether a CPU build of torch is installed; to pip it is the wanted version as well as any other."""
    try:
        return importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False


def cpu_index() -> list[str]:
    """Where the CPU build of torch is, on a machine that can reach it."""
    try:
        with urllib.request.urlopen(TORCH_CPU_INDEX + "/torch/", timeout=5):
            return ["--extra-index-url", TORCH_CPU_INDEX]
    except OSError:
        return []


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tools/install.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda", action="store_true", help="the build of torch for GPUs, though none is here")
    cuda = parser.parse_args(arguments).cuda or has_gpu()
    if sys.prefix == sys.base_prefix:
        sys.exit("tools/install.py installs into a virtual environment only: use ./run.sh, which makes .venv")
    begin = time.monotonic()
    lock = ROOT / "requirements.lock"
    # One package exists as source only (antlr4-python3-runtime): it is built with the locked setuptools.
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(only(lock.read_text(), "setuptools"))
        file.flush()
        pip("--require-hashes", "--no-deps", "-r", file.name)
    print("   packages of requirements.lock ...", flush=True)
    pip("--require-hashes", "--no-deps", "--no-build-isolation", "--no-compile", "-r", str(lock))
    print(f"   torch ... ({time.monotonic() - begin:.0f} s so far)", flush=True)
    if cuda and without_cuda():
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "-q", "-y", "torch"], check=True)
    pip("--no-compile", "-r", str(ROOT / "requirements-torch.txt"), *([] if cuda else cpu_index()))
    check = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    if check.returncode:
        sys.exit(f"installation does not fit together:\n{check.stdout.strip()}")
    print(f"   installed in {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
