"""Fills the virtual environment that runs it: `.venv/bin/python tools/install.py`.

Everything but torch comes from requirements.lock, every version pinned with its hash; torch comes by its version
alone, since its build differs between a CPU and a CUDA machine. Where there is no NVIDIA GPU the CPU build is
preferred, which spares gigabytes. Standard library only: nothing is installed yet.
"""

from __future__ import annotations

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


def cpu_index() -> list[str]:
    """Where the CPU build of torch is, on a machine without an NVIDIA GPU that can reach it."""
    if shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0:
        return []
    try:
        with urllib.request.urlopen(TORCH_CPU_INDEX + "/torch/", timeout=5):
            return ["--extra-index-url", TORCH_CPU_INDEX]
    except OSError:
        return []


def main() -> None:
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
    pip("--no-compile", "-r", str(ROOT / "requirements-torch.txt"), *cpu_index())
    check = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    if check.returncode:
        sys.exit(f"installation does not fit together:\n{check.stdout.strip()}")
    print(f"   installed in {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
