"""What is known of a run, from a callback that watched it or from what it left behind, in one shape.

A Trace holds series over steps and a few facts; `shape` reads from its loss whether anything was learned, when, and
whether it was lost again. Standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean, median

from tools.doctor.finding import Plot

# Nats a character of English predicted by the best model that hears nothing (tools.report.curve draws the same line);
# of other texts it is measured (units.py).
LETTERS_ONLY = 2.85
SPACELESS = 0.02  # share of spaces, 0.18 in English: below it a "word" is mostly a whole utterance
LEARNED = 0.8  # of that level: below it the audio has been used
RANDOM = 0.93  # above this share of it nothing was learned

EARLY_STEPS = 200  # after the warm-up: before that a plateau is no news
OVER_STEPS = 600  # a run that is over after so many and still on its plateau has not learned
LATE_STEPS = 2000  # a plateau that has lasted so long is one, whatever the plan
KEPT = 2000  # points of a series

Points = list[tuple[int, float]]


@dataclass
class BadStep:
    """The first step at which something was not finite.

    Attributes:
        step: counted in optimizer steps.
        what: "loss", "gradient", "log-probs", "parameters", "features", "audio".
        origin: where it began: "audio", "features", "forward", "loss", "backward", "parameters" or "unknown".
        module: name of the first module with a non-finite output (or of the parameter), "" where not known.
        kind: class of that module.
        inputs_finite: whether what the module was given, and its parameters, were finite.
        utterances: of that batch.
        details: further evidence, name -> value.
        growth: largest absolute value over time of that module's output (frames, values), where it could be traced.
        depth: (module, largest absolute output) in order of execution.
    """

    step: int
    what: str
    origin: str = "unknown"
    module: str = ""
    kind: str = ""
    inputs_finite: bool = True
    utterances: list[str] = field(default_factory=list)
    details: dict = field(default_factory=dict)
    growth: tuple[list[float], list[float]] | None = None
    depth: list[tuple[str, float]] = field(default_factory=list)


@dataclass
class Trace:
    """A run. Series: loss (nats a character where `loss_unit` is "character"), grad_norm, blank_rate, letter_rate
    (share of the commonest label among the frames that are not blank), labels_used, lr, update (size of a step
    relative to the weights), spread (how much log-probs differ from frame to frame), level (loss of the best constant
    output), wait (share of time spent waiting for data), val_loss, val_wer, val_cer, val_blank_rate, infeasible."""

    series: dict[str, Points] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    loss_unit: str = "unknown"
    level: float | None = None  # of the loss, in its unit: the best output that does not listen
    planned: int | None = None  # steps
    warmup: int | None = None
    clip: float | None = None  # 0: off, None: not known
    precision: str = ""
    optimizer: str = ""
    recipe: str = ""
    corpus: str = ""
    ended: bool = False  # no further step will come
    bad: BadStep | None = None
    bad_steps: int = 0
    zero_infinity: bool | None = None
    utterances_seen: int = 0
    infeasible: dict[str, tuple[int, int]] = field(default_factory=dict)  # utterance -> (frames needed, frames there)
    infeasible_seen: int = 0
    top_label: str = ""
    target_share: dict[str, float] = field(default_factory=dict)  # label -> share of all targets
    still: list[str] | None = None  # parameters that never had a gradient; None: not looked at
    still_share: float = 0.0  # of all parameters
    settings: object = None  # configs.Settings, or None
    spaces: float | None = None  # share of them in the train texts
    first_batch: list[int] = field(default_factory=list)  # keys of its texts, in a run on several devices
    reported: set[str] = field(default_factory=set)  # ids in the report that the callback left
    messages: list[tuple[str, str]] = field(default_factory=list)  # (where, line) of logs that matter
    hypotheses: list[str] = field(default_factory=list)  # that NeMo wrote to the log, oldest first
    places: dict[int, str] = field(default_factory=dict)  # step -> epoch and batch, of a curve from a text log
    unread: dict = field(default_factory=dict)  # path of a file that ought to say something -> why it does not

    def get(self, name: str) -> Points:
        return self.series.get(name, [])

    def values(self, name: str, since: float = 0.0) -> list[float]:
        """Finite values of a series after a share `since` of its steps."""
        points = self.get(name)
        if not points:
            return []
        begin = points[0][0] + since * (points[-1][0] - points[0][0])
        return [value for step, value in points if step >= begin and math.isfinite(value)]

    def add(self, name: str, step: int, value: float) -> None:
        """One more point."""
        self.series.setdefault(name, []).append((step, value))

    def thin(self) -> None:
        """Old points of long series in pairs, as their means."""
        for name, points in self.series.items():
            if len(points) > KEPT:
                old, new = points[: KEPT // 2], points[KEPT // 2:]
                old = [((a[0] + b[0]) // 2, (a[1] + b[1]) / 2) for a, b in zip(old[::2], old[1::2])]
                self.series[name] = old + new

    def save(self, path) -> None:
        """All series as a CSV, a row a step; explain reads it again."""
        from manifests.schema import write_atomic

        rows: dict[int, dict[str, float]] = {}
        for name, points in self.series.items():
            for step, value in points:
                rows.setdefault(step, {})[name] = value
        names = list(self.series)
        lines = [",".join(["step", *names])]
        lines += [",".join([str(step), *(f"{row[n]:.6g}" if n in row else "" for n in names)]) for step,
            row in sorted(rows.items())]
        write_atomic(path, ("\n".join(lines) + "\n").encode())

    @property
    def counts_sentences(self) -> bool:
        """Whether the word error rate is one of whole utterances, because texts hold hardly any space: it stays near 1
        while most characters are right."""
        if self.settings is not None and self.settings.get("model.use_cer"):
            return False
        share = self.spaces
        if share is None and self.utterances_seen >= 8 and all(len(label) == 1 for label in self.target_share):
            share = self.target_share.get(" ", 0.0) if self.target_share else None
        return share is not None and share < SPACELESS

    @property
    def last_step(self) -> int:
        return max((points[-1][0] for points in self.series.values() if points), default=0)

    def key(self, key: str) -> str:
        """A configuration key as the user writes it."""
        return self.settings.key(key) if self.settings is not None else key

    def plot(self, title: str, names: dict[str, str], y_label: str, level: bool = False, note: str = "") -> Plot:
        """Series by name -> label of the line, over steps; with the level of the best constant output where asked."""
        series = {}
        for name, label in names.items():
            if points := self.get(name):
                series[label] = ([p[0] for p in points], [p[1] for p in points])
        if level and self.level:
            series["letters alone"] = ([0, max(self.last_step, 1)], [self.level, self.level])
        return Plot(title, "step", y_label, series, note)


def smooth(points: Points, share: float = 0.05) -> Points:
    """Running median over a share of the points (at least 5), so that one bad batch is no event."""
    points = [(step, value) for step, value in points if math.isfinite(value)]
    width = max(int(len(points) * share), 5)
    return [(points[i][0], median(v for _, v in points[max(0, i - width + 1): i + 1])) for i in range(len(points))]


@dataclass
class Shape:
    """What a loss curve looks like. Losses in the trace's unit; `learned` None where it cannot be told."""

    first: float
    best: float
    best_step: int
    last: float
    last_step: int
    level: float | None
    learned: bool | None
    lost: bool  # learned, and then lost it again
    lost_step: int | None
    flat: bool  # the second half brought less than 2 % of the level

    @property
    def stuck(self) -> bool:
        return self.learned is False and self.level is not None and self.last > RANDOM * self.level


def shape(trace: Trace) -> Shape | None:
    """Reads the loss; None where there are fewer than four finite points."""
    finite = [(s, v) for s, v in trace.get("loss") if math.isfinite(v)]
    if len(finite) < 4:
        return None
    if len(finite) > 800:  # medians of stretches say the same
        width = len(finite) // 400
        finite = [(part[-1][0], median(v for _, v in part)) for part
            in (finite[k: k + width] for k in range(0, len(finite), width))]
    line = smooth(finite)
    level = trace.level
    if level is None and trace.loss_unit == "character":
        level = LETTERS_ONLY
    best_step, best = min(line, key=lambda p: p[1])
    first = fmean(v for _, v in finite[: max(len(finite) // 20, 1)])
    last_step, last = line[-1]
    wers = trace.values("val_wer")
    learned = None
    if level is not None:
        learned = best < LEARNED * level
    if wers and min(wers) < _heard(trace):
        learned = True
    lost_step = None
    top = level if level is not None else first
    if learned and best < top:
        threshold = best + 0.5 * (top - best)
        after = [(s, v) for s, v in line if s > best_step]
        # For good: every smoothed point from there on is above.
        for s, v in reversed(after):
            if v < threshold:
                break
            lost_step = s
        if level is None and lost_step is not None and not _lost_too(trace, finite, line, lost_step):
            lost_step = None
    half = [v for s, v in line if s >= (finite[0][0] + last_step) / 2]
    scale = level if level is not None else max(abs(first), 1e-9)
    flat = len(half) > 1 and abs(half[0] - half[-1]) < 0.02 * scale
    return Shape(first, best, best_step, last, last_step, level, learned, lost_step is not None, lost_step, flat)


def _heard(trace: Trace) -> float:
    """The error rate below which the audio was used: a lone letter has a CER far below its WER of 1."""
    return 0.6 if trace.settings is not None and trace.settings.get("model.use_cer") else 0.85


def _lost_too(trace: Trace, finite: Points, line: Points, lost_step: int) -> bool:
    """Whether a loss of unknown unit was lost. A flat and noisy one, as in a fine-tuning, comes back "half of the way"
    all the time: the error rate has to be lost with it, or the loss far outside of its noise where none was measured
    since."""
    rates = [(s, v) for s, v in trace.get("val_wer") if math.isfinite(v)]
    best = min((v for _, v in rates), default=math.inf)
    if since := [v for s, v in rates if s >= lost_step]:
        return since[-1] > max(1.5 * best, best + 0.1)
    noise = median(abs(raw - usual) for (_, raw), (_, usual) in zip(finite, line))
    return line[-1][1] - min(v for _, v in line) > 6 * noise


def still_rising(points: Points) -> bool:
    """Whether a learning rate was still in its warm-up at the end: never fell, and grew over the last third."""
    values = [v for _, v in points if math.isfinite(v)]
    if len(values) < 4:
        return False
    return all(b >= a * 0.999 for a, b in zip(values, values[1:])) and values[-1] > 1.2 * values[2 * len(values) // 3]
