"""The doctor: what keeps a NeMo CTC model from converging, found before, during or after training.

    python -m tools.doctor check --config-name conformer corpus=mini      # before
    trainer = Trainer(callbacks=[tools.doctor.Doctor()])                   # during
    python -m tools.doctor explain exp/conformer_mini                      # after

Or from Python: `tools.doctor.examine(model=model, manifests={"train": "train.json"})`. Importing this package imports
neither torch nor NeMo.
"""

from __future__ import annotations

_LAZY = {
    "examine": "tools.doctor.engine",
    "Doctor": "tools.doctor.callback",
    "Finding": "tools.doctor.finding",
    "Plot": "tools.doctor.finding",
    "Report": "tools.doctor.finding",
}
__all__ = list(_LAZY)


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
