"""The list of checks: each is one function from a Subject to findings, with the faults it can name.

A new check is one function in the module of its family:

    @check("lengths", faults=("length-mismatch",), needs=("model",))
    def lengths_match_output(subject):
        \"\"\"Returned lengths are those of the output.\"\"\"
        ...
        yield Finding("length-mismatch", ...)

and one page in pages/. `faults` that it does not name count as ruled out. Where a check finds that it cannot judge, it
raises NotExamined with the reason, before its first finding or after. Modules of families are imported only where
there is something for them to examine; the light ones (data, tokenizer, schedule, limits, order, run) import no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tools.doctor.finding import PAGES, Finding

# family -> (its modules, what it needs, of which one is enough for it to be worth importing), in the order of examination.
FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "data": ("tools.doctor.data tools.doctor.twice", ("manifests",)),
    "audio": ("tools.doctor.audio tools.doctor.noise", ("manifests",)),
    "pairs": ("tools.doctor.transcripts tools.doctor.pairs tools.doctor.languages tools.doctor.texts "
              "tools.doctor.segments", ("manifests",)),
    "tokenizer": ("tools.doctor.tokenizer", ("manifests", "config", "model")),
    "schedule": ("tools.doctor.schedule", ("config", "model")),
    "limits": ("tools.doctor.limits tools.doctor.trials tools.doctor.monitors", ("config",)),
    "order": ("tools.doctor.order", ("config",)),
    "outputs": ("tools.doctor.outputs", ("model",)),
    "features": ("tools.doctor.features tools.doctor.spectrum tools.doctor.augmentor", ("model",)),
    "lengths": ("tools.doctor.lengths", ("model",)),
    "labels": ("tools.doctor.labels", ("model",)),
    "loss": ("tools.doctor.loss", ("model",)),
    "gradients": ("tools.doctor.gradients tools.doctor.slopes", ("model",)),
    "optimizer": ("tools.doctor.optimizer tools.doctor.steps", ("model",)),
    "weights": ("tools.doctor.weights", ("model",)),
    "locality": ("tools.doctor.locality tools.doctor.delay", ("model",)),
    "neighbours": ("tools.doctor.neighbours", ("model",)),
    "invariance": ("tools.doctor.invariance", ("model",)),
    "depth": ("tools.doctor.depth tools.doctor.attention", ("model",)),
    "exchange": ("tools.doctor.exchange", ("model",)),
    "validation": ("tools.doctor.validation", ("model",)),
    "heard": ("tools.doctor.heard", ("model",)),
    "loader": ("tools.doctor.delivered", ("model",)),
    "run": ("tools.doctor.run tools.doctor.monitors", ("run",)),
    "metrics": ("tools.doctor.metrics", ("run",)),
}
NEEDS = ("manifests", "config", "model", "run")


class NotExamined(Exception):
    """A check cannot judge; the message says why, in a few words."""


@dataclass(frozen=True)
class Check:
    """One registered check. `title` is the first line of its docstring."""

    name: str
    family: str
    faults: tuple[str, ...]
    needs: tuple[str, ...]
    function: Callable[..., Iterable[Finding]]

    @property
    def title(self) -> str:
        return (self.function.__doc__ or self.name.replace("_", " ")).strip().splitlines()[0].rstrip(".")


_CHECKS: dict[str, Check] = {}


def check(family: str, faults: Iterable[str] = (), needs: Iterable[str] = ()):
    """Decorator that registers a check; the function itself stays as it is.

    `needs`: of NEEDS, all that the subject must have. Raises ValueError for a family or need that there is not, and
    for two checks of one name in one family.
    """
    if family not in FAMILIES:
        raise ValueError(f"family {family!r}: must be one of {', '.join(FAMILIES)}")
    if unknown := set(needs) - set(NEEDS):
        raise ValueError(f"needs {sorted(unknown)}: must be of {', '.join(NEEDS)}")

    def register(function):
        key = f"{family}.{function.__name__}"
        known = _CHECKS.get(key)
        if known is not None and known.function.__module__ != function.__module__:
            raise ValueError(f"check {key} is there already, in {known.function.__module__}")
        _CHECKS[key] = Check(function.__name__, family, tuple(faults), tuple(needs), function)
        return function

    return register


def checks(available: Iterable[str] | None = None, families: Iterable[str] | None = None) -> list[Check]:
    """The checks to run, in order: those of `families` (all) whose module needs something of `available` (all)."""
    available = set(NEEDS if available is None else available)
    wanted = list(FAMILIES if families is None else families)
    for family in FAMILIES:
        modules, needs = FAMILIES[family]
        if family in wanted and available & set(needs):
            for module in modules.split():
                importlib.import_module(module)
    order = list(FAMILIES)
    found = [c for c in _CHECKS.values() if c.family in wanted and available & set(FAMILIES[c.family][1])]
    return sorted(found, key=lambda c: order.index(c.family))  # stable: in a family as they stand in the file


def catalogue() -> dict[str, str]:
    """Fault id -> its title, from the first line of each page; imports nothing."""
    titles = {}
    for page in sorted(PAGES.glob("*.md")):
        with page.open(encoding="utf-8") as file:
            titles[page.stem] = file.readline().strip().lstrip("# ").removeprefix(f"{page.stem}: ")
    return titles
