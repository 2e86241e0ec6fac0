"""fit() that is called again and again for one model: each time the steps and the schedule begin anew."""

from __future__ import annotations

import weakref

from tools.doctor.finding import Finding
from tools.doctor.trace import Trace

OFTEN = 3  # two may be two stages
LIKE = 0.1  # by which their lengths may differ
UNFINISHED = 0.1  # of the highest rate that is set: a schedule that ends above it was made for a longer run


class Starts:
    """What is known of the fits of one model in this process. It outlives a run."""

    def __init__(self):
        self._model = lambda: None
        self.lengths: list[int] = []  # of the fits so far
        self.rates: list[float] = []  # highest, of each
        self._last = 0.0  # rate at the end of the last

    def begin(self, trainer, model) -> list[Finding]:
        """A finding where the third fit begins as the two before it did, and none had come to its schedule's end."""
        if self._model() is not model or trainer.global_step:
            self._model = weakref.ref(model)
            self.lengths, self.rates = [], []
        group = trainer.optimizers[0].param_groups[0] if trainer.optimizers else {}
        top, now = float(group.get("initial_lr", group.get("lr", 0.0))), float(group.get("lr", 0.0))
        alike = len(self.lengths) + 1 >= OFTEN and max(self.lengths) <= (1 + LIKE) * min(self.lengths)
        anew = bool(trainer.lr_scheduler_configs) and self._last > UNFINISHED * top and abs(now - self._last) > LIKE * top * LIKE
        if not alike or not anew:
            return []
        count, steps = len(self.lengths) + 1, sum(self.lengths)
        return [Finding(
            "run-ended", "warning",
            f"This is fit() number {count} of the same model, each from step 0: in {steps} steps so far the schedule was begun "
            f"anew each time, and the highest rate was {max(self.rates):.2g} of {top:.2g}.",
            "Each fit() makes a new optimizer and a new schedule: moments are lost, the warm-up begins again, and the rate "
            "that the schedule was made for is never reached, or never left.",
            {"fits": count, "steps of each": self.lengths[-12:], "highest rate of each": self.rates[-12:],
             "rate at the end of the last": self._last, "rate now": now},
            [f"one trainer.fit() over all the data: max_steps={max(steps + self.lengths[-1], 1)} or more",
             "or trainer.fit(model, ckpt_path=the last checkpoint), with the max_steps of the whole"], 0.9,
            where="trainer.fit")]

    def end(self, trace: Trace) -> None:
        """To be called when a run is over."""
        rates = trace.values("lr")
        self.lengths.append(trace.last_step)
        self.rates.append(max(rates, default=0.0))
        self._last = rates[-1] if rates else 0.0
