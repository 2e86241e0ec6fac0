"""What the configuration's optimizer makes of a gradient: steps down it, as long as the learning rate says."""

from __future__ import annotations

import torch

from tools.doctor.finding import Finding
from tools.doctor.frames import some_matrices
from tools.doctor.gradients import backward
from tools.doctor.optimizer import made, optimizer_settings
from tools.doctor.registry import NotExamined, check
from tools.doctor.schedule import lr_range, plan
from tools.doctor.trained import started_from

STEPS = 10  # with one gradient
UPHILL = 0.1  # cosine between the way and the gradient, from which on it goes up
USUAL_EPS = 1e-8
ARRIVES = 0.1  # share of a step with the usual eps, under which eps is said
FAR = 1.0  # of the weights: a single step that changes them so far throws away what they were
HARDLY = 1e-3  # of the way of others
NOTHING, LITTLE = 0.03, 0.15  # of the weights: as far as a whole run moves them, where they cannot learn, or hardly; usual
#   are 0.3 and more, though no run goes straight on
TRIAL = 200  # steps of a run that may well be a trial


@check("optimizer", faults=("step-uphill", "lr-too-low", "lr-too-high"), needs=("config", "model"))
def steps_go_down(subject):
    """Steps of the optimizer go down the gradient, and are as long as its rate says."""
    optim, _ = optimizer_settings(subject)
    rate = plan(subject).peak
    if not rate or rate < 0:
        raise NotExamined("the learning rate is not known, or not above 0")
    weights, gradients = _clipped(subject)
    optim = {**optim, "lr": rate, "weight_decay": 0.0} if "weight_decay" in optim else {**optim, "lr": rate}
    way, first, last = _walk(subject.model, optim, weights, gradients)
    key = subject.settings.key("model.optim")
    size = _norm(way)
    up = float(sum((w * g).sum() for w, g in zip(way, gradients))) / max(size * _norm(gradients), 1e-30)
    if size and up > UPHILL:
        yield Finding(
            "step-uphill", "prevents", f"{STEPS} steps of the optimizer with one gradient go up it (cosine {up:.2f}).",
            "Each step makes the loss larger. Optimizers go down the gradient by themselves.",
            {"cosine": round(up, 3), "optimizer": optim.get("name", "adam"), "maximize": optim.get("maximize")},
            [f"{key}.maximize=false"], 0.95, where=key)
        return
    eps = optim.get("eps")
    if isinstance(eps, float) and eps > USUAL_EPS:
        share = size / max(_norm(_walk(subject.model, {**optim, "eps": USUAL_EPS}, weights, gradients)[0]), 1e-30)
        if share < ARRIVES:
            yield Finding(
                "lr-too-low", "prevents" if share < ARRIVES / 10 else "warning",
                f"{key}.eps={eps:g} outweighs the gradients: of the learning rate {share:.2%} arrives.",
                "Adam divides each gradient by its usual size plus eps. Gradients of CTC are small numbers; with an eps "
                "far above them steps are not of the size of the rate but of the gradient times rate over eps.",
                {"eps": eps, "share of a step that is made": round(share, 5),
                 "gradient, root mean square": _norm(gradients) / sum(g.numel() for g in gradients) ** 0.5},
                [f"{key}.eps={USUAL_EPS:g}"], 0.9, where=f"{key}.eps")
            return
    still = _standing(way, weights, gradients)
    if still:
        yield Finding(
            "lr-too-low", "prevents",
            f"Of {len(way)} matrices, each with a gradient, {still} hardly move in {STEPS} steps of the optimizer, by their size "
            "less than a thousandth of what the others do.",
            "The optimizer does not treat all parameters alike. NeMo's Adafactor writes its rate over with the rate times the size of each "
            "parameter, one after the other: after some of them it is 0 for all the rest.",
            {"matrices that stand still": still, "of": len(way), "optimizer": optim.get("name", "adam"), "learning rate": rate},
            [f"{key}.name=adamw {key}.lr=1e-3", f"{key}.scale_parameter=false, for Adafactor"], 0.9, where=key)
        return
    far = _norm(first) / max(_norm(weights), 1e-30)
    low, high, _ = lr_range(subject.settings)  # outside of it the rate itself is named, by another check
    if far > FAR and rate <= high:
        yield Finding(
            "lr-too-high", "prevents",
            f"With the gradient of a batch, one step at the highest rate moves the weights by {far:.3g} times their size.",
            "The rate may be a usual one for this optimizer; the gradient is not. A loss that is summed over utterances or "
            "frames has one as many times as large, and nothing clips it.",
            {"of their size, in one step": round(far, 3), "learning rate": rate,
             "gradient, norm": _norm(gradients), "ctc_reduction": subject.settings.get("model.ctc_reduction"),
             "gradient_clip_val": subject.settings.get("trainer.gradient_clip_val")},
            ["trainer.gradient_clip_val=1.0", "model.ctc_reduction=mean_batch", f"{key}.lr a hundredth of it"], 0.85,
            where=f"{key}.lr")
        return
    steps = plan(subject).steps
    if steps and not started_from(subject.settings) and rate >= low:
        reach = steps * _norm(last) / max(_norm(weights), 1e-30)
        if reach < LITTLE:
            yield Finding(
                "lr-too-low", "prevents" if steps >= TRIAL and reach < NOTHING else "warning",
                f"In the run's {steps} steps the weights can move by {reach:.2g} of their size at the most.",
                "All steps with one gradient, at the highest rate, would leave them where they are: rate, limit of "
                "gradients and optimizer together make next to no step.",
                {"of their size, in the whole run": reach, "learning rate": rate, "steps": steps,
                 "gradient_clip_val": subject.settings.get("trainer.gradient_clip_val")},
                [f"{key}.lr ten or a hundred times as high", "trainer.gradient_clip_val=1.0 where it is lower"], 0.85,
                where=f"{key}.lr")


def _standing(way: list, weights: list, gradients: list) -> int:
    """How many matrices move, by their size, next to nothing of what others do, and more so than by their gradients."""
    moved, pulled = ([float(part.norm() / w.norm().clamp(min=1e-12)) for part, w in zip(parts, weights)]
                     for parts in (way, gradients))
    most, hardest = max(moved), max(pulled)
    return sum(own < HARDLY * most * pull / hardest for own, pull in zip(moved, pulled) if pull > 0) if most > 0 else 0


def _clipped(subject) -> tuple[list, list]:
    """Some matrices of the model and their gradients, clipped as the trainer would."""
    probe, s = subject.probe, subject.settings
    with probe.ready(train=True):
        backward(probe)
        chosen = [p for p in some_matrices(probe.model) if p.grad is not None]
        every = [p.grad for p in probe.model.parameters() if p.grad is not None]
        limit = s.number("trainer.gradient_clip_val") or 0.0
        by_value = s.get("trainer.gradient_clip_algorithm") == "value"
        scale = 1.0
        if limit and not by_value:
            scale = min(1.0, limit / max(float(torch.nn.utils.get_total_norm(every)), 1e-30))
        gradients = [p.grad.detach().float().clone() * scale for p in chosen]
        weights = [p.detach().float().clone() for p in chosen]
    if limit and by_value:
        gradients = [g.clamp(-limit, limit) for g in gradients]
    if not gradients or not all(bool(torch.isfinite(g).all()) for g in gradients) or not _norm(gradients):
        raise NotExamined("the gradient of the probe's batch is 0, or not finite")
    return weights, gradients


def _walk(model, optim: dict, weights: list, gradients: list) -> tuple[list, list, list]:
    """The ways of STEPS steps, of the first, and of the last, of a new optimizer: from these weights, always with these
    gradients."""
    parameters = [torch.nn.Parameter(w.clone()) for w in weights]
    try:
        optimizer = made(type(model), optim, parameters)
        for step in range(STEPS):
            before = [p.detach().clone() for p in parameters]
            for p, g in zip(parameters, gradients):
                p.grad = g.clone()
            for group in optimizer.param_groups:
                group["lr"] = optim["lr"]  # as a schedule would: NeMo's Adafactor writes its own over it
            optimizer.step()
            if step == 0:
                first = [p.detach() - w for p, w in zip(parameters, weights)]
    except Exception as error:  # whatever anybody's optimizer raises: that it cannot be made is told elsewhere
        raise NotExamined(f"the optimizer makes no step by itself: {type(error).__name__}: {error}") from None
    return ([p.detach() - w for p, w in zip(parameters, weights)], first,
            [p.detach() - old for p, old in zip(parameters, before)])


def _norm(tensors: list) -> float:
    return float(torch.stack([t.square().sum() for t in tensors]).sum().sqrt())
