"""How often the live schedules are stepped, against the optimizer's steps."""

from __future__ import annotations

from tools.doctor.finding import Finding
from tools.doctor.live import MOST_REHEARSED, rehearsed
from tools.doctor.trace import Trace

OFTEN = 1.5  # steps of the schedule to one of the optimizer
FEWEST = 10  # optimizer steps to judge by
ENDS = 0.75  # of its steps to come, before which a schedule that is over is over early
LOW = 0.02  # of the highest rate: as good as the end
EARLY = 0.25  # of the run: a schedule that is over by then leaves nothing to learn with
LENGTHS = ("max_steps", "total_steps", "T_max", "_max_steps")


class Ticks:
    """Counts the steps of a run's schedules since it began, or since another took their place."""

    def __init__(self):
        self.begun: dict[int, tuple[int, int]] = {}  # schedule -> (its step, the optimizer's) when it was first seen
        self.said = False

    def look(self, trainer, steps: int, trace: Trace) -> Finding | None:
        """A finding, once; `steps`: of the optimizer so far."""
        for config in [] if self.said else trainer.lr_scheduler_configs:
            at = getattr(config.scheduler, "last_epoch", None)
            if config.reduce_on_plateau or not isinstance(at, int):
                continue
            first, before = self.begun.setdefault(id(config.scheduler), (at, steps))
            if steps - before < FEWEST or at - first < OFTEN * (steps - before):
                continue
            often = (at - first) / (steps - before)
            over = _over(config.scheduler, at, often, steps, trace.planned)
            if over is not None:
                self.said = True
                return _finding(config, often, at - first, steps - before, *over, trace)
        return None


def _over(scheduler, at: int, often: float, steps: int, planned: int | None) -> tuple[int, str] | None:
    """(optimizer step at which the schedule is over, its length in words), where that is long before the run is."""
    if planned is None or planned <= steps:
        return None
    to_come = int(often * (planned - steps))
    length = next((n for name in LENGTHS if isinstance(n := getattr(scheduler, name, None), int) and n > 0), None)
    if length is not None:
        left = max(length - at, 0)
        said = f"it is made for {length} steps"
    elif to_come <= MOST_REHEARSED:
        try:
            rates = rehearsed(scheduler, to_come)
        except Exception:  # anybody's schedule
            return None
        top = max(map(float, getattr(scheduler, "base_lrs", [])), default=0.0)
        left = next((k for k in range(len(rates), 0, -1) if rates[k - 1] > LOW * top), 0)
        said = f"its rate is next to 0 after {at + left} steps"
    else:
        return None
    return (steps + round(left / often), said) if left < ENDS * to_come else None


def _finding(config, often: float, ticks: int, steps: int, over: int, said: str, trace: Trace) -> Finding:
    kind = type(config.scheduler).__name__
    return Finding(
        "schedule-per-epoch", "prevents" if over < EARLY * trace.planned else "warning",
        f"The schedule is stepped {often:.2g} times to each step of the optimizer ({kind}: {ticks} in {steps}): {said}, and "
        f"is over at about step {over} of {trace.planned}.",
        "It is stepped twice: by Lightning (interval) and by hand, in on_train_batch_end or training_step; or at each batch, "
        "where the optimizer steps after several. Warm-up and peak are shorter than meant, and for the rest of the run the "
        "rate is at its lowest.",
        {"scheduler": kind, "interval": config.interval, "steps of the schedule": ticks, "steps of the optimizer": steps,
         "over at step": over, "of": trace.planned},
        ["take scheduler.step() out of the hook: Lightning steps what configure_optimizers returns",
         "with automatic_optimization=False: lr_schedulers().step() only after optimizer.step()"], 0.95,
        where="on_train_batch_end", plots=[trace.plot("Learning rate", {"lr": ""}, "rate")] if trace.get("lr") else [])
