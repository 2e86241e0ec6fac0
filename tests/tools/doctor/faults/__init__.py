"""Faults put into healthy set-ups, one a file: what the doctor must name, and at which stage.

A module here defines `FAULT`. Half of them, by the parity of a hash of the name, are held out: whoever writes the
doctor does not read those files, so that the rate on them says something about faults nobody has thought of.
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STAGES = ("before", "during", "after")


def held_out(name: str) -> bool:
    """Whether this name is of the half that stays unread; an odd last digit of its SHA-1."""
    return int(hashlib.sha1(name.encode()).hexdigest(), 16) % 2 == 1


@dataclass(frozen=True)
class Fault:
    """One fault.

    `make(folder)` builds it. Before: the keyword arguments of `examine`. During: it trains with a callback and
    returns the callback's report. After: it trains without any doctor and returns the keyword arguments of `examine`,
    with `run`.
    """

    name: str
    expects: tuple[str, ...]  # accepted ids, the most apt first
    stage: str
    make: Callable[[Path], Any]
    run: Callable[..., Any] | None = None  # during: what `make` does, with any callbacks; for showing the harm

    @property
    def held_out(self) -> bool:
        return held_out(self.name)


@dataclass(frozen=True)
class Healthy:
    """One set-up in which no finding may have the weight "prevents"; `make` is as for a fault."""

    name: str
    stage: str
    make: Callable[[Path], Any]
    run: Callable[..., Any] | None = None

    @property
    def held_out(self) -> bool:
        return held_out(self.name)


def collect(package: str, attribute: str) -> list:
    """What the modules of a package define under `attribute`, by name; light, no torch."""
    place = importlib.import_module(package)
    names = sorted(found.name for found in pkgutil.iter_modules(place.__path__))
    return [getattr(importlib.import_module(f"{package}.{name}"), attribute) for name in names]


def faults() -> list[Fault]:
    return collect("tests.tools.doctor.faults", "FAULT")


def healthy() -> list[Healthy]:
    return collect("tests.tools.doctor.healthy", "HEALTHY")
