"""The failures that this project began with, each reproduced with real speech in several plausible ways.

    python -m tools.histories list
    python -m tools.histories run NAME --data train.json --dev dev.json --out DIR --fixed

A history is a YAML in `cases/` (a recipe of conf/, what is changed for the broken and for the repaired version, what
the user saw, the cause, the fix) and, where the fault is in code, a small module with the mistake as somebody would
make it. What each run showed, and what the doctor said of it, is in `results/` (`--keep` puts it there). Importing this
package imports neither torch nor NeMo.
"""

from __future__ import annotations
