"""Whether the optimizer is asked for steps in a live run, whether they go down, and whether the weights stay there."""

from __future__ import annotations

import math

import torch

from tools.doctor.finding import Finding
from tools.doctor.frames import some_matrices
from tools.doctor.trace import Trace

FEWEST, MOST = 10, 500  # batches without a step before it is said: an epoch's, within these


class Moved:
    """Follows the one optimizer of a run by hooks on its steps.

    Where `look` is set, some matrices are held from before a step and from after it, and compared with what they are
    before the next: the share of the step that was taken back meanwhile is added to the trace as `undone`. A weight
    average that is swapped in for a validation and out again leaves nothing of that. The cosine between the step and
    the gradient that it was made with, turned round, is added as `downhill`. Where gradients were there after the
    backward pass, `cleared` is 1 if they are gone when the step is made, else 0.

    counted: gives a context in which the time that this takes is counted.
    """

    def __init__(self, model, optimizers, trace: Trace, counted):
        self.parameters = some_matrices(model)
        self.begun = [p.detach().clone() for p in self.parameters]
        self.trace, self.counted = trace, counted
        self.look, self.batches, self.steps = False, 0, 0
        self._before: list | None = None
        self._after: list | None = None
        self._pull: torch.Tensor | None = None  # size of the gradients after the last backward pass
        hooks = [getattr(o, name, None) for o in optimizers for name in ("register_step_pre_hook",
                                                                        "register_step_post_hook")]
        alone = len(optimizers) == 1 and all(hooks)  # of several each moves its own part, at its own steps
        self._handles = [hooks[0](self._before_step), hooks[1](self._after_step)] if alone else []

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def backward(self) -> None:
        """To be called after each backward pass."""
        if self.look and self._handles:
            self._pull = size_of([p.grad for p in self.parameters])

    def _before_step(self, *_) -> None:
        with self.counted():
            if self._pull is not None:
                there, now = torch.stack([self._pull, size_of([p.grad for p in self.parameters]).to(self._pull)]).tolist()
                if 0 < there < math.inf:
                    self.trace.add("cleared", self.steps, float(now == 0))
                self._pull = None
            if self._after is not None:
                share = undone(self._before, self._after, self.parameters)
                if math.isfinite(share):
                    self.trace.add("undone", self.steps, share)
            self._after, self._before = None, [p.detach().clone() for p in self.parameters] if self.look else None

    def _after_step(self, *_) -> None:
        with self.counted():
            self.steps += 1
            self.begun = []  # it was for a run that makes no step
            if self._before is not None:
                self._after = [p.detach().clone() for p in self.parameters]
                down = downhill(self._before, self._after, [p.grad for p in self.parameters])
                if math.isfinite(down):
                    self.trace.add("downhill", self.steps, down)

    def batch(self, trainer, asked: bool) -> Finding | None:
        """To be called after each batch; `asked`: whether a step has been asked for in this run. A finding, once."""
        self.batches += 1
        epoch = trainer.num_training_batches
        enough = max(FEWEST, min(epoch if isinstance(epoch, int) else MOST, MOST))
        if asked or self.steps or self.batches != enough or not self.parameters or not trainer.optimizers:
            return None
        if not all(torch.equal(p.detach(), old) for p, old in zip(self.parameters, self.begun)):
            return None  # somebody moves them without Lightning
        manual = not trainer.lightning_module.automatic_optimization
        cause, fix = "The loss is computed and nothing is learned from it.", [
            "step at the last batch of an epoch too, or leave it to Lightning: trainer.accumulate_grad_batches=N"]
        if manual:
            cause = ("The loss is computed and nothing is learned from it: with automatic_optimization=False the model has "
                     "to step by itself, and the condition that it waits for has not come.")
            fix.insert(0, "look at the number of batches that are added up before a step, against the batches of an epoch")
        return Finding(
            "weights-not-moved", "prevents",
            f"After {self.batches} batches no optimizer step has been made, and no weight has moved.",
            cause,
            {"batches": self.batches, "batches an epoch": str(epoch), "automatic optimization": not manual,
             "accumulate_grad_batches": trainer.accumulate_grad_batches},
            fix, 0.9, where="training_step" if manual else "optimizer")


class PassedOver:
    """Counts the batches of automatic optimization that have no backward pass: training_step has returned None."""

    def __init__(self):
        self.batches = self.without = 0
        self.said = False

    def batch(self, trainer, backward: bool) -> Finding | None:
        """To be called after each batch; `backward`: whether it has had a backward pass. A finding, once."""
        if not trainer.lightning_module.automatic_optimization:
            return None
        self.batches += 1
        self.without += not backward
        if self.said or self.batches < FEWEST or self.without <= 0.5 * self.batches:
            return None
        self.said = True
        return Finding(
            "weights-not-moved", "prevents" if self.without == self.batches else "warning",
            f"Of the first {self.batches} batches {self.without} had no backward pass: training_step returned no loss.",
            "Lightning leaves such a batch out, and the optimizer's step finds no gradient. A guard against broken batches "
            "(return None where the loss is too high) keeps out what training begins with: an untrained model's loss is 10 "
            "to some hundreds, and falls by being trained on.",
            {"batches": self.batches, "without a backward pass": self.without},
            ["return the loss of every batch that is finite; clip gradients in place of leaving batches out: "
             "trainer.gradient_clip_val=1.0"], 0.95, where="training_step")


def size_of(gradients: list) -> torch.Tensor:
    """Norm of those that are there, a scalar tensor."""
    present = [g.detach() for g in gradients if g is not None and not g.is_sparse]
    return torch.stack([g.float().norm() for g in present]).norm() if present else torch.zeros(())


@torch.no_grad()
def undone(before: list, after: list, now: list) -> float:
    """The share of a step, `before` to `after`, that is taken back `now`: the median over the tensors, 0 where none is."""
    shares = []
    for old, placed, value in zip(before, after, now):
        step = (placed - old).float()
        size = float((step * step).sum())
        if size > 0:
            shares.append(float((step * (placed - value).float()).sum()) / size)
    return sorted(shares)[len(shares) // 2] if shares else math.nan


@torch.no_grad()
def downhill(before: list, after: list, gradients: list) -> float:
    """Cosine between a step, `before` to `after`, and the way down the gradients; NaN where either is nothing."""
    sums = [torch.stack([((old - new) * g).float().sum(), (old - new).float().square().sum(), g.float().square().sum()])
            for old, new, g in zip(before, after, gradients) if g is not None and not g.is_sparse]
    if not sums:
        return math.nan
    along, step, gradient = torch.stack(sums).sum(dim=0).tolist()
    return along / (step * gradient) ** 0.5 if step > 0 and gradient > 0 else math.nan
