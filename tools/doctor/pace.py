"""The callback's share of a run's time: what it has cost so far, and how often it may look."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
