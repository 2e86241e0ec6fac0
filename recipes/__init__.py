"""The models and what is done with them. Importing this package makes its classes known to NeMo.

NeMo 3 builds a `_target_` (from YAML, or when it restores a `.nemo`) only if its name starts with an entry of
the private list `nemo.core.classes.common.ALLOWED_TARGET_PREFIXES`. This module adds ours, and is the only
place that touches that list; `tests/recipes/test_nemo_canary.py` fails loudly when NeMo changes it.

`import recipes` stays light: importing NeMo takes ten seconds, so where NeMo is not loaded yet the entry is
added at the moment it gets loaded.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

PREFIX = __name__ + "."
NEMO_MODULE = "nemo.core.classes.common"


def _allow(module, prefix: str = PREFIX) -> None:
    if prefix not in module.ALLOWED_TARGET_PREFIXES:
        module.ALLOWED_TARGET_PREFIXES.append(prefix)


def allow_targets(prefix: str) -> None:
    """Lets NeMo build by `_target_` all whose name begins with `prefix` ("my_models."). Loads NeMo."""
    _allow(import_module(NEMO_MODULE), prefix)


class _AllowOnImport(MetaPathFinder):
    """Finds nothing itself: it lets the usual finder find NEMO_MODULE and adds our prefix after it has run."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != NEMO_MODULE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            _allow(module)

        spec.loader.exec_module = exec_module
        return spec


if NEMO_MODULE in sys.modules:
    _allow(sys.modules[NEMO_MODULE])
elif not any(type(finder).__name__ == _AllowOnImport.__name__ for finder in sys.meta_path):
    sys.meta_path.insert(0, _AllowOnImport())
