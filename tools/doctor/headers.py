"""Whose audio is looked at where there are very many files. Standard library only."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterable

MOST = 50_000  # headers; of more rows so many are drawn at random
HEAD = 65536  # bytes of a manifest from which its number of lines is estimated


class Headers:
    """Asked at each row whether its audio is looked at: all of few, of many some, until half of the time is over.

    Attributes:
        passed: manifest -> rows whose audio is not looked at.
    """

    def __init__(self, subject, manifests: Iterable[str]):
        self._subject, self._half = subject, subject.seconds_left() / 2
        self._share = min(MOST / max(sum(map(estimated_lines, manifests)), 1), 1.0)
        self._draw = random.Random(subject.seed).random
        self._over = False
        self._asked = 0
        self.passed: Counter = Counter()

    def __call__(self, manifest: str) -> bool:
        self._asked += 1
        self._over = self._over or self._subject.seconds_left() < self._half
        if self._over or self._draw() >= self._share:
            self.passed[manifest] += 1
            return False
        return True

    @property
    def said(self) -> str:
        """What was not looked at, in words; "" where all was."""
        if not (left := self.passed.total()):
            return ""
        why = ", then half of the time was over" if self._over else ", drawn at random"
        return f"the audio of {self._asked - left} of {self._asked} rows was looked for and its headers read{why}"


def estimated_lines(manifest: str) -> float:
    """Lines of a file, by its size and the length of its first ones; 0 where it cannot be read."""
    try:
        with open(manifest, "rb") as file:
            head = file.read(HEAD)
            return head.count(b"\n") * max(os.fstat(file.fileno()).st_size / max(len(head), 1), 1.0)
    except OSError:
        return 0.0
