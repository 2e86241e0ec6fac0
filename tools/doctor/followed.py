"""What the callback follows beside the curves: each part measures one thing of the live run and speaks once."""

from __future__ import annotations

from tools.doctor import utterances
from tools.doctor.delivered import Delivered, moving
from tools.doctor.drawn import Drawn
from tools.doctor.finding import Finding
from tools.doctor.jumps import Jumps
from tools.doctor.modes import Modes
from tools.doctor.moved import Moved, PassedOver
from tools.doctor.registry import NotExamined
from tools.doctor.ticks import Ticks
from tools.doctor.trace import Trace


class Followed:
    """The parts, and what they have found: whoever asks takes it out of `found`.

    Attributes:
        look: whether this batch is one that is looked at.
        moved: moved.Moved, of the optimizer.
    """

    def __init__(self, trainer, model, trace: Trace, counted):
        self.trace, self.look = trace, False
        self.found: list[Finding] = []
        self.lines: tuple[list[str], list[str]] = [], []  # what was examined, and what was not
        manifests = trace.settings.manifests.get("train", []) if trace.settings is not None else []
        self.moved = Moved(model, trainer.optimizers, trace, counted)
        self._delivered = Delivered(manifests, utterances.rate_of(model), utterances.frame_rate_of(model))
        self._delivered.options = moving(trace.settings)
        self._drawn = Drawn(manifests)
        self._jumps, self._modes, self._ticks, self._passed_over = Jumps(model), Modes(), Ticks(), PassedOver()
        self._ticks.look(trainer, self._steps(trainer), trace)

    def _steps(self, trainer) -> int:
        """Optimizer steps; Lightning's own number counts those of all optimizers."""
        return trainer.global_step if trainer.lightning_module.automatic_optimization else self.moved.steps

    def batch_begins(self, look: bool, batch) -> None:
        self.look = self.moved.look = look
        self._drawn.take(batch)

    def forward_done(self, trainer, model) -> None:
        if self.look:
            self._say(self._modes.look(model, trainer.optimizers, trainer.global_step + 1))

    def before_step(self, trainer) -> None:
        self._say(self._jumps.compare(trainer.global_step))

    def batch_ends(self, trainer, batch_idx: int, asked: bool, backward: bool) -> None:
        """`asked`: whether a step has been asked for in this run; `backward`: whether this batch has had a backward pass."""
        self._jumps.hold(trainer, batch_idx)
        self._say(self.moved.batch(trainer, asked))
        self._say(self._passed_over.batch(trainer, backward))
        if self.look and (steps := self._steps(trainer)):
            self._say(self._ticks.look(trainer, steps, self.trace))

    def epoch_ends(self, trainer) -> None:
        self._say(self._drawn.judge(trainer))

    def deliver(self, batch, model, call) -> None:
        """Rows of the first batches against the manifest, until there are enough of them."""
        seen = self._delivered
        if not seen.wanted:
            return
        seen.add(batch, utterances.target_texts(model, call))
        if not seen.wanted:
            try:
                self.found += seen.judge()
                self.lines[0].append(seen.title)
            except NotExamined as reason:
                self.lines[1].append(f"{seen.title}: {reason}")

    def _say(self, finding: Finding | None) -> None:
        if finding is not None:
            self.found.append(finding)

    def taken(self) -> list[Finding]:
        """What is new."""
        new, self.found = self.found, []
        return new
