"""What this machine's processor is, as Linux tells it. Imports nothing heavy."""

from __future__ import annotations

import platform
import re
from pathlib import Path

# The widest first. With AVX512-BF16 and AMX it multiplies in bfloat16.
UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "avx512f": "AVX512", "avx2": "AVX2"}


def _told(field: str) -> str:
    try:
        found = re.search(rf"^{field}\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else ""


def vector_units() -> str:
    """`AMX`, `AVX512-BF16`, `AVX512`, `AVX2`, or nothing where it is none of these or not told."""
    flags = _told("flags").split()
    return next((unit for flag, unit in UNITS.items() if flag in flags), "")


def processor() -> str:
    """Its name with its vector units: processors of one name may train at a third of each other's speed by them."""
    name, units = _told("model name") or platform.processor() or platform.machine(), vector_units()
    return f"{name} ({units})" if units else name
