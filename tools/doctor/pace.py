"""The callback's share of a run's time: what it has cost so far, and how often it may look."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tools.doctor.trace import Trace


def settle(device: torch.device) -> None:
    """Waits until a device has done what it was given; what runs on the CPU is done when it returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Pace:
    """Counts seconds, and tells how many steps may lie between two looks.

    Attributes:
        begun: time.perf_counter() at the start of the run; None outside one.
        cost: seconds spent in the callback.
        waited: seconds in which it stood still until the device had done what it was given before. That is the model's
            time; but the steps that follow could have been prepared meanwhile.
        stride: steps between two looks at the outputs.
    """

    def __init__(self, every_n_steps: int, budget: float):
        self.every_n_steps, self.budget = every_n_steps, budget
        self.begun: float | None = None
        self.cost = self.waited = 0.0
        self.stride = every_n_steps

    @contextmanager
    def counted(self, asked: torch.device | None = None) -> Iterator[float]:
        """Counts the time of a `with` block, and gives the time at its beginning.

        `asked`: the device that the block will ask for a number. The first such question waits for all that the
        device was given before, a whole backward pass on a GPU: the model's cost and not ours, so the wait comes first.
        """
        begin = time.perf_counter()
        if asked is not None:
            settle(asked)
            self.waited += time.perf_counter() - begin
            begin = time.perf_counter()
        try:
            yield begin
        finally:
            self.cost += time.perf_counter() - begin

    def affordable(self, times: float = 1.0, least: float = 20.0) -> bool:
        """Whether an optional look is within `times` the budget, of the run's time or of `least` seconds."""
        if self.begun is None:
            return False
        return self.cost < times * self.budget * max(time.perf_counter() - self.begun, least)

    def adapt(self) -> None:
        """Looks less often where it costs more than its share, and more often again where it does not."""
        spent = max(time.perf_counter() - self.begun, 1e-9)
        if self.cost > self.budget * spent:
            self.stride = min(self.stride * 2, 50 * self.every_n_steps)
        elif self.stride > self.every_n_steps and self.cost < 0.5 * self.budget * spent:
            self.stride //= 2

    def share(self) -> str:
        """The cost in words."""
        seconds = time.perf_counter() - self.begun
        waited = f"; waited {self.waited:.1f} s for the device" if self.waited > 0.1 else ""
        return f"{self.cost:.2f} s of {seconds:.0f} s, {self.cost / max(seconds, 1e-9):.2%}{waited}"


class Waits:
    """Share of the time from batch to batch that is spent waiting for the next one."""

    MANY = 50  # batches that make a point of the curve, where it is not looked at sooner

    def __init__(self):
        self._shares: list[float] = []
        self._ended: float | None = None  # when the batch before was done
        self._wait: float | None = None
        self._began = 0.0

    def begins(self, now: float) -> None:
        """A batch is there."""
        self._wait, self._began = None if self._ended is None else now - self._ended, now

    def ends(self, now: float, trace: Trace, step: int, stride: int | None) -> None:
        """It is done; `stride`: batches that make a point where this step is looked at, None where it is not."""
        if self._wait is not None:
            self._shares.append(self._wait / max(self._wait + now - self._began, 1e-9))
        if self._shares and len(self._shares) >= min(stride or self.MANY, self.MANY):
            trace.add("wait", step, sorted(self._shares)[len(self._shares) // 2])
            self._shares = []

    def rests(self, waits: bool) -> None:
        """From now on the time is that of waiting; or of something else, where `waits` is False."""
        self._ended = time.perf_counter() if waits else None
