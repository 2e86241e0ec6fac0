"""Weights of a run that no step moves, or that do not stay where a step has put them. Standard library only."""

from __future__ import annotations

from statistics import fmean, median

from tools.doctor.finding import Finding
from tools.doctor.registry import NotExamined
from tools.doctor.trace import Trace

UPHILL = -0.05  # cosine of steps with the way down their gradients, under which they go up


def gone(trace: Trace) -> bool:
    """Whether gradients that were there after the backward pass are gone when the optimizer makes its step."""
    seen = trace.values("cleared")
    return len(seen) >= 3 and fmean(seen) > 0.5


def unmoved(trace: Trace) -> list[Finding]:
    """Parameters without gradient, or that no step has moved."""
    if trace.still is None:
        raise NotExamined("the gradients were not seen")
    if not trace.still or gone(trace):
        return []
    encoder = [name for name in trace.still if "encoder" in name]
    heavy = bool(encoder) and trace.still_share > 0.5
    return [Finding(
        "no-gradient", "prevents" if heavy else "warning",
        f"{len(trace.still)} parameter tensors had no gradient in any step, first {trace.still[0]}.",
        "They are detached from the loss, frozen, or not used in the forward pass.",
        {"parameters": trace.still[:12], "tensors": len(trace.still)},
        ["look for .detach(), .data, torch.no_grad() or requires_grad=False on the way from them to the loss",
         "a layer that is built but not called: delete it"], 0.8, where=trace.still[0])]


def undone(trace: Trace) -> list[Finding]:
    """Steps that are taken back before the next one."""
    if gone(trace):
        return [_cleared(trace)]
    shares = trace.values("undone")
    if len(shares) < 3:
        raise NotExamined("the weights after a step were not held against those before the next")
    share = median(shares)
    if share < 0.5:
        return []
    return [Finding(
        "weights-not-moved", "prevents" if share > 0.9 else "warning",
        f"{min(share, 1.0):.1%} of each optimizer step is taken back before the next: the weights are not where the "
        "optimizer put them.",
        "Something writes the weights between two steps: an average or a saved copy that is put into the model and never "
        "taken out, or a callback that restores.",
        {"share taken back": round(share, 4), "steps looked at": len(shares)},
        ["keep the average beside the model and swap it in for validation only (NeMo: exp_manager.ema.enable=true)",
         "look in on_train_batch_end of model and callbacks for copy_(), load_state_dict(), .data ="], 0.9,
        plots=[trace.plot("Share of a step that is taken back", {"undone": "taken back"}, "share")])]


def _cleared(trace: Trace) -> Finding:
    seen = trace.values("cleared")
    return Finding(
        "weights-not-moved", "prevents",
        f"In {sum(value > 0.5 for value in seen)} of {len(seen)} steps that were looked at, gradients were there after the "
        "backward pass and are zero (or None) at optimizer.step(): it moves no weight.",
        "They are cleared between the two: zero_grad() after backward in place of before it, or a hook (on_after_backward, "
        "on_before_optimizer_step) that sets them to zero. The learning rate has no part in it.",
        {"steps looked at": len(seen), "of them with gradients cleared before the step": sum(v > 0.5 for v in seen)},
        ["optimizer.zero_grad(); manual_backward(loss); optimizer.step(), in this order",
         "where batches are added up, zero_grad() only after a step"], 0.95, where="training_step")


def uphill(trace: Trace) -> list[Finding]:
    """Steps that go up the gradient."""
    cosines = trace.values("downhill")
    if len(cosines) < 5:
        raise NotExamined("too few steps were held against their gradients")
    if median(cosines) > UPHILL:
        return []
    return [Finding(
        "step-uphill", "prevents",
        f"The optimizer's steps go up the gradient (cosine with the way down {median(cosines):.2f}).",
        "Each step makes the loss larger: maximize=True, a negative rate, or a step of one's own that adds where it "
        "should subtract.",
        {"cosine with the way down, median": round(median(cosines), 3), "steps looked at": len(cosines)},
        [f"{trace.key('model.optim.maximize')}=false", "p.sub_(rate * p.grad) in a step of one's own"], 0.9,
        plots=[trace.plot("Steps against the gradient", {"downhill": "1: straight down"}, "cosine")])]
