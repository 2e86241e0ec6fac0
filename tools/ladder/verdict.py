"""What a rung that was not climbed rules out, in one message. Imports nothing heavy.

The rungs below it were climbed, so what they need is in order; what the failing one adds, and how its curve ended,
say where to look.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tools.ladder.rungs import Rung
from tools.report.curve import read_curve

# A model that gives blanks, one letter, or letters by their frequency has more errors than this on anything.
NO_SPEECH = 0.75

BELOW = {
    "64": "One batch was learned, so the targets fit, the loss is that of these outputs and the gradient arrives",
    "1h": "64 utterances were learned by heart in the training loop, so sampler, buckets, lengths, BatchNorm and "
          "decoding work",
    "all": "1 h was learned, so model, labels and schedule can learn speech",
}
SUSPECTS = {
    "64": "what one batch does not show: the schedule in steps (warm-up, decay), the learning rate for batches that "
          "change, utterances of a batch that influence each other, or capacity",
    "1h": "what 64 short utterances without dropout and masks do not show: texts that do not belong to their audio "
          "(by heart any text is learned), long utterances, masks and dropout too strong, the learning rate over a "
          "longer schedule, or capacity",
    "all": "what more data brings: utterances or labels of another kind in the rest of the manifest, capacity, the "
           "number of passes, or a learning rate that does not hold for long",
}


@dataclass
class Course:
    """How training went, from curve.csv; steps, seconds of training over all sittings, nats a character, CER."""

    status: int = 0  # of the training process
    last_line: str = ""  # that it printed
    steps: int = 0
    seconds: float = 0.0
    losses: list[tuple[float, float]] = field(default_factory=list)
    validation_losses: list[tuple[float, float]] = field(default_factory=list)
    errors: list[tuple[float, float]] = field(default_factory=list)
    clock: dict[float, float] = field(default_factory=dict)  # seconds at a step

    @classmethod
    def read(cls, curve: Path) -> "Course":
        """Of a run's curve.csv; empty where there is none yet. Raises ValueError for a cell that is no number."""
        if not curve.is_file():
            return cls()
        columns = read_curve(curve)
        clock = dict(columns.get("seconds", []))
        return cls(
            steps=int(max(clock, default=0)), seconds=max(clock.values(), default=0.0), clock=clock,
            losses=columns.get("loss_per_char", []), validation_losses=columns.get("val_loss", []),
            errors=columns.get("val_cer", []),
        )

    def reached(self, target: float) -> tuple[int, float] | None:
        """(step, seconds) of the first validation whose CER is not above `target`, else None."""
        step = next((step for step, error in self.errors if error <= target + 1e-6), None)
        return None if step is None else (int(step), self.clock[step])

    def falling(self) -> bool:
        """Whether the last quarter of the validations brought the error down by a tenth and more."""
        values = [error for _, error in self.errors]
        quarter = len(values) // 4
        return quarter > 0 and min(values[-quarter:]) < 0.9 * min(values[:-quarter])


def passed(rung: Rung, course: Course, train: float, dev: float) -> str:
    """The message of a rung that was climbed; `train` and `dev` are character error rates."""
    at = course.reached(rung.target)
    where = f" at step {at[0]}, after {at[1] / 60:.1f} min" if at else ""
    message = f"{'dev' if rung.whole else 'train'} CER at most {rung.target:.0%}{where}"
    if rung.regularised and dev >= NO_SPEECH and dev > 2 * train:
        message += (
            f". But dev CER is {dev:.0%}: what is learned here does not carry over at all. Overfitting, or a dev set "
            "of other spelling, sample rate or speech (python -m tools.doctor check)"
        )
    return message


def failed(rung: Rung, course: Course, train: float, dev: float, unit: str = "a character") -> str:
    """What the failure of `rung` rules out and leaves, one message; `train` and `dev` are character error rates."""
    below = BELOW[rung.name]
    if course.status == 3:
        return (
            f"rung {rung.name}: training diverged ({course.last_line}). {below}. Left are a learning rate too high, a "
            "warm-up too short, precision, or a recurrence that grows with the length of an utterance"
        )
    measured = f"CER {train:.1%} on what it trains on and {dev:.1%} on dev"
    missed = (
        f"rung {rung.name}: {measured} after {course.steps} steps and {course.seconds / 60:.0f} min, not "
        f"{rung.target:.0%}{' on dev' if rung.whole else ''}. {below}"
    )
    loss = course.losses[-1][1] if course.losses else float("nan")
    validation = course.validation_losses[-1][1] if course.validation_losses else float("nan")
    if not rung.regularised and validation > 3 * loss + 0.3:
        # The same utterances without dropout and masks: both modes should give the same loss.
        return (
            f"{missed}. But the loss of the same utterances is {loss:.2f} nats {unit} in training and {validation:.2f} "
            "in evaluation mode: the two modes disagree. BatchNorm statistics (over padding, or too slow), utterances "
            "of a batch that influence each other, or lengths"
        )
    if train >= NO_SPEECH:
        return (
            f"{missed}. It still predicts blanks or frequent letters and hears nothing: not capacity and not "
            f"overfitting. Left is {SUSPECTS[rung.name]}"
        )
    if rung.whole and dev > 2 * train:
        return (
            f"{missed}. What it trains on is learned and dev is not: overfitting. More data, stronger masks and "
            "dropout, a smaller model; not the learning rate, not the labels. A dev set of other spelling or sample "
            "rate looks the same"
        )
    if course.falling():
        return (
            f"{missed}. The error was still falling: it is slow, not stuck. Give it more (--minutes, --epochs) before "
            "looking for a fault; after that, the learning rate"
        )
    return f"{missed}. The error falls and then stays: some is learned. Left is {SUSPECTS[rung.name]}"
