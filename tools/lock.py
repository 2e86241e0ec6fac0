"""Makes requirements.lock from pyproject.toml: `python tools/lock.py` (needs uv: pip install uv).

Every version with its hashes, for Python 3.10 to 3.12, but torch and what belongs to its build: tools/install.py
installs that by its version.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OF_TORCH = re.compile(r"(torch|triton|cuda-toolkit|nvidia-[a-z0-9-]+)==")
COMMAND = ["uv", "pip", "compile", "--universal", "--python-version", "3.10", "--generate-hashes", "--all-extras",
           "--no-annotate", "--no-header", "-q", "pyproject.toml"]


def main() -> None:
    compiled = subprocess.run(COMMAND, cwd=ROOT, capture_output=True, text=True)
    if compiled.returncode:
        sys.exit(compiled.stderr)
    kept, keep = [], True
    for line in compiled.stdout.splitlines():
        if not line.startswith(" "):
            keep = not OF_TORCH.match(line)
        if keep:
            kept.append(line)
    header = "# Made by tools/lock.py; torch and what belongs to its build stand in requirements-torch.txt.\n"
    (ROOT / "requirements.lock").write_text(header + "\n".join(kept) + "\n")


if __name__ == "__main__":
    main()
