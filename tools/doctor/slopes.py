"""Does the loss fall along the gradient that the backward pass gives? Tried by small ways, without an optimizer."""

from __future__ import annotations

import math
import time

import torch

from tools.doctor.finding import Finding
from tools.doctor.gradients import parts
from tools.doctor.probe import untouched
from tools.doctor.registry import NotExamined, check
from tools.doctor.training_step import run_training_step

PARTS = 3  # of the model, in order of its parameters
FALL = 0.01  # of the loss, that a way is to bring
FARTHEST = 0.02  # of the weights' size
NOISE = 1e-4  # of the loss
UP = -0.3  # change by what the gradient promises, under which it goes up
SHORTER = 8  # times, for the second try


@check("gradients", faults=("step-uphill",), needs=("model",))
def gradients_point_down(subject):
    """A small way down the gradient of each part of the model makes the loss smaller."""
    probe = subject.probe
    began = time.perf_counter()
    with probe.ready(train=True):
        with untouched(probe.model):  # a step may count the batches, and draw by their number
            step = run_training_step(probe)
            if step.loss is None or step.backward or step.loss.numel() != 1 or not step.loss.requires_grad:
                raise NotExamined(f"the training step gives no loss to go backwards from ({step.error or 'it does so itself'})")
            step.loss.sum().backward()
            given = [(name, p, p.grad) for name, p in probe.model.named_parameters()
                     if p.requires_grad and p.grad is not None and bool(torch.isfinite(p.grad).all())]
        base = _loss(probe)
        if not math.isfinite(base) or abs(base - float(step.loss.detach())) > NOISE * abs(base):
            raise NotExamined("the same step gives another loss when it is run again")
        if 2 * PARTS * (time.perf_counter() - began) > subject.seconds_left():
            raise NotExamined("it would take too long")
        width = max(math.ceil(len(given) / PARTS), 1)
        for chunk in (given[k: k + width] for k in range(0, len(given), width)):
            tried = _tried(probe, chunk, base, 1)
            if tried is not None and tried[0] < UP * tried[1]:
                again = _tried(probe, chunk, base, SHORTER)  # a longer way may end behind the valley
                if again is not None and again[0] < UP * again[1]:
                    yield _finding(chunk, *tried)
                    return


def _loss(probe) -> float:
    with untouched(probe.model):
        step = run_training_step(probe)  # with its graph: a hook on an output needs one
    return math.nan if step.loss is None else float(step.loss.detach().sum())


def _tried(probe, chunk: list, base: float, shorter: int) -> tuple[float, float] | None:
    """(by how much the loss falls on a small way down these gradients, by how much it should); None where it would be
    too little to be seen."""
    square = sum(float(g.double().square().sum()) for *_, g in chunk)
    size = math.sqrt(sum(float(p.detach().double().square().sum()) for _, p, _ in chunk))
    if square <= 0:
        return None
    way = min(FALL * abs(base) / square, FARTHEST * size / math.sqrt(square)) / shorter
    if way * square < 5 * NOISE * abs(base):
        return None
    held = [p.detach().clone() for _, p, _ in chunk]
    with torch.no_grad():
        for _, p, g in chunk:
            p.sub_(way * g)
    after = _loss(probe)
    with torch.no_grad():
        for (_, p, _), value in zip(chunk, held):
            p.copy_(value)
    return (base - after, way * square) if math.isfinite(after) else None


def _finding(chunk: list, falls: float, promised: float) -> Finding:
    names = parts([name for name, *_ in chunk])
    return Finding(
        "step-uphill", "prevents",
        f"A small way down the gradient of {names[0]} to {names[-1]} makes the loss larger, by {-falls:.2g}, where it should "
        f"fall by {promised:.2g}.",
        "Their gradient has the wrong sign: a layer or hook that reverses gradients (lambda g: -g) lies on an output that the "
        "CTC loss uses too, or a backward of one's own is wrong. Each step unlearns there what the loss asks for.",
        {"the loss falls by": falls, "by the gradient": promised, "modules": names[:12]},
        ["reverse gradients on a copy for the other branch alone: other = encoded.clone(); other.register_hook(...)",
         "torch.autograd.gradcheck for a backward of one's own"], 0.9, where=names[0])
