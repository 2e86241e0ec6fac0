"""What the learning rate of a run did: zero, too low, too high, or never out of its warm-up. Standard library only."""

from __future__ import annotations

import math
from statistics import fmean, median, pstdev

from tools.doctor.finding import Finding
from tools.doctor.nonfinite import lr_too_high
from tools.doctor.registry import NotExamined
from tools.doctor.trace import EARLY_STEPS, OVER_STEPS, Trace, shape, still_rising
from tools.doctor.unmoved import gone

TINY_UPDATE, HUGE_UPDATE = 1e-6, 0.1  # of the weights' size in one step, as a rule
LEAP = 0.5  # and once, among the first
HIGH_RATE = 2e-2  # of an Adam whose run is stuck
NO_RATE = 0.05  # of an Adam: nothing trains at it, whatever the model
DROP, SMALL = 0.55, 0.02  # a rate by the one before that is a drop, and by the highest that is next to nothing
ROSE = 1.5  # loss at the end by loss at the start, of a run that has only become worse


def learning_rate(trace: Trace) -> list[Finding]:
    """Learning rate of zero, too low, too high, or never out of its warm-up."""
    rates = [(s, v) for s, v in trace.get("lr") if math.isfinite(v)]
    updates = [v for v in trace.values("update") if v >= 0]
    curve = shape(trace)
    if not rates and not updates:
        raise NotExamined("no learning rate in these logs")
    plots = [trace.plot("Learning rate", {"lr": ""}, "rate")] if rates else []
    if trace.get("loss"):
        plots.insert(0, trace.plot("Loss", {"loss": "loss"}, "loss", level=True))
    if updates:
        plots.append(trace.plot("Size of a step relative to the weights", {"update": ""}, "relative update"))
    if len(rates) >= 3 and max(v for _, v in rates[1:]) == 0:
        key = trace.key("model.optim.lr")
        return [Finding("lr-zero", "prevents", f"The learning rate is 0 in all {rates[-1][0]} steps.",
                        "Nothing is updated.", {"steps": rates[-1][0]}, [f"{key}=1e-3"], 1.0, where=key, plots=plots)]
    if (over := _over_early(trace, rates, plots)) is not None:
        return [over]
    if curve is not None and curve.learned and not curve.lost:
        return []
    return [*_too_low(trace, curve, rates, plots), *_too_high(trace, curve, rates, updates, plots)]


def _over_early(trace: Trace, rates, plots) -> Finding | None:
    """A schedule that falls to its end over the whole run, and was there long before."""
    settings = trace.settings
    if settings is None:
        return None
    name, steps = str(settings.get("model.optim.sched.name") or ""), trace.planned or settings.number("model.optim.sched.max_steps")
    if not name.lower().startswith(("cosine", "square", "polynomial", "warmup")) or not steps or len(rates) < 10:
        return None
    if "schedule-per-epoch" in trace.reported:
        return None  # the callback has counted
    steps -= settings.number("model.optim.sched.constant_steps") or 0  # at the end, by NeMo
    peak, last = max(v for _, v in rates), rates[-1][1]
    end = next((rates[k][0] for k in range(len(rates)) if all(v <= 1.02 * last for _, v in rates[k:])), steps)
    if not 0 <= last < SMALL * peak or end > 0.6 * steps or rates[-1][0] < end + 0.15 * steps:
        return None
    return Finding(
        "schedule-per-epoch", "warning",
        f"{name} is made for {steps:.0f} steps, and its rate was at its lowest, {last:.2g}, from step {end} on.",
        "It is stepped more than once to each step of the optimizer: by Lightning and by hand (on_train_batch_end, "
        "training_step), or at each batch where the optimizer steps after several. From there on next to nothing is learned.",
        {"at its lowest from step": end, "steps of the schedule": steps, "highest rate": peak, "lowest": last},
        ["take scheduler.step() out of the hook: Lightning steps what configure_optimizers returns"], 0.9,
        where="on_train_batch_end", plots=plots)


def _too_low(trace: Trace, curve, rates, plots) -> list[Finding]:
    """A warm-up that the run does not leave, or steps that move nothing."""
    peak = max((v for _, v in rates), default=None)
    nearly_over = trace.ended or bool(trace.planned) and trace.last_step > 0.8 * trace.planned
    if trace.warmup and trace.planned and trace.warmup >= 0.7 * trace.planned and trace.last_step > 2:
        what = f"The warm-up takes {trace.warmup} steps and the run has {trace.planned}"
        return [_warmup(trace, what, 0.95, plots, peak)]
    if still_rising(rates) and nearly_over and curve is not None and not curve.learned and trace.last_step >= 50:
        what = f"The learning rate was still rising at the last step, {rates[-1][0]}"
        return [_warmup(trace, what, 0.75, plots, peak)]
    drops = [(a, b, step) for (_, a), (step, b) in zip(rates, rates[1:]) if 0 <= b < DROP * a]
    # Of a loss of unknown unit the validation's error rate says that nothing was learned.
    waits = curve is not None and (curve.learned is False or curve.learned is None and bool(trace.values("val_wer")))
    if len(drops) >= 2 and rates[-1][1] < SMALL * peak and waits and len({v for _, v in rates}) <= len(drops) + 3:
        return [Finding(
            "lr-too-low", "prevents",
            f"The learning rate was cut from {peak:.2g} to {rates[-1][1]:.2g} in {len(drops)} drops, the first at step "
            f"{drops[0][2]}, before the model had begun to learn.",
            "A schedule that waits for a metric to fall (ReduceLROnPlateau) takes the start-up plateau for the end: a word "
            "error rate stays at 1.0, or above, for some epochs before it falls. Now nothing moves any more.",
            {"highest rate": peak, "rate at the end": rates[-1][1], "drops at steps": [step for *_, step in drops][:8]},
            ["a schedule by steps: CosineAnnealing with warmup_steps of a tenth of the run",
             "or a patience of several epochs, and val_loss for the monitor"], 0.85,
            where=trace.key("model.optim.sched"), plots=plots)]
    # In a warm-up the first steps move nothing, and are meant to.
    updates = [v for s, v in trace.get("update") if s > (trace.warmup or 0) and math.isfinite(v) and v >= 0]
    if gone(trace) or trace.still and updates and median(updates) == 0:
        return []  # the rate has no part in it: there was no gradient
    if len(updates) >= 3 and median(updates) < TINY_UPDATE and trace.last_step >= 50 and not still_rising(rates):
        key = trace.key("model.optim.lr")
        return [Finding(
            "lr-too-low", "prevents",
            f"A step moves the weights by {median(updates):.1e} of their size (the median): hardly at all.",
            "At this rate a run of usual length ends where it began.",
            {"relative update, median": median(updates), "peak learning rate": peak}, [f"{key}=1e-3"], 0.85,
            where=key, plots=plots)]
    return []


def _too_high(trace: Trace, curve, rates, updates, plots) -> list[Finding]:
    """Steps that are large against the weights, a loss that is thrown about, or one lost as the rate rose."""
    if curve is None:
        return []
    if curve.lost:
        return _lost_to_rate(trace, curve, rates, plots)
    after = trace.last_step - (trace.warmup or 0)
    peak = max((v for _, v in rates), default=0.0)
    adaptive = "adam" in (trace.optimizer or "adam").lower()
    if curve.stuck and curve.last > 2 * curve.level and trace.last_step >= 20:
        rose = curve.last > ROSE * curve.first
        leaps = len(updates) >= 3 and max(updates) > LEAP
        if adaptive and peak >= NO_RATE or rose and leaps:
            what = (f"the rate is {peak:.2g}, and the loss went from {curve.first:.3g} to {curve.last:.3g}, far above "
                    f"the {curve.level:.3g} of predicting letters without listening")
            evidence = {"loss at the start": curve.first, "loss at the end": curve.last,
                        "level of letters alone": curve.level,
                        "largest relative update": max(updates, default=None)}
            return [lr_too_high(trace, what, evidence, plots, 0.95 if adaptive and peak >= NO_RATE else 0.8)]
    if not curve.stuck or after < 50:
        return []
    late = updates[len(updates) // 2:]
    stays = f"the loss stays at {curve.last:.3g}"
    evidence = {"loss at the end": curve.last, "level of letters alone": curve.level}
    if len(updates) >= 6 and median(late) > HUGE_UPDATE:
        what = f"each moves the weights by {median(late):.0%} of their size (the median), and {stays}"
        return [lr_too_high(trace, what, {"relative update, median": median(late), **evidence}, plots, 0.9)]
    if after >= 100 and len(updates) >= 3 and max(updates[:10]) > LEAP:
        what = f"one of the first moved the weights by {max(updates[:10]):.0%} of their size, and {stays}"
        weight = "prevents" if curve.last > 1.2 * curve.level or after >= OVER_STEPS else "warning"
        return [lr_too_high(trace, what, {"largest relative update at the start": max(updates[:10]), **evidence}, plots,
                            0.8, weight)]
    if after >= 100 and _thrown_about(trace, curve):
        what = (f"the loss is thrown about around {curve.last:.3g}, above the {curve.level:.3g} of predicting letters "
                "without listening")
        return [lr_too_high(trace, what, evidence, plots, 0.7)]
    if adaptive and after >= EARLY_STEPS and rates and _at(rates, trace.last_step) > HIGH_RATE:
        what = f"the rate is {peak:.2g} with {trace.optimizer or 'an adaptive optimizer'}, and {stays}"
        weight = "prevents" if curve.flat and after >= OVER_STEPS else "warning"
        return [lr_too_high(trace, what, evidence, plots, 0.75, weight)]
    return []


def _warmup(trace: Trace, what: str, confidence: float, plots, peak) -> Finding:
    sched = trace.key("model.optim.sched.warmup_steps")
    steps = trace.planned or trace.last_step
    return Finding(
        "warmup-too-long", "prevents", f"{what}: the run ends in its warm-up, at a rate of {peak:.2g}.",
        "The schedule was made for a longer run or a larger batch: the peak that it was tuned for is never reached.",
        {"warm-up steps": trace.warmup, "steps": steps, "highest learning rate reached": peak},
        [f"{sched}={max(int(0.1 * steps), 1)} (a tenth of the steps)",
         "NoamAnnealing ends its warm-up at d_model**-0.5 * warmup_steps**-0.5 * lr: with fewer warm-up steps check "
         "that peak"],
        confidence, where=sched, plots=plots)


def _thrown_about(trace: Trace, curve) -> bool:
    """Whether the second half lies above the level throughout, and jumps; a few last losses that run away do not."""
    late = trace.values("loss", since=0.5)
    usual = sorted(late)[: max(len(late) - len(late) // 10, 1)]
    return len(late) >= 8 and median(late) > 1.3 * curve.level and pstdev(usual) > 0.15 * fmean(usual)


def _at(points, step) -> float:
    return next((v for s, v in reversed(points) if s <= step), points[0][1])


def _lost_to_rate(trace: Trace, curve, rates, plots) -> list[Finding]:
    """It learned at a lower rate and lost it as the rate rose."""
    # The best of the smoothed loss lags a little behind the best of the loss.
    good = min((v for s, v in rates if 0.9 * curve.best_step <= s <= curve.best_step), default=0.0)
    bad = max(v for s, v in rates if s <= (curve.lost_step or curve.last_step))
    if good > 0 and bad > 1.5 * good:
        return [lr_too_high(
            trace, f"the loss was {curve.best:.3g} at step {curve.best_step} with a rate of {good:.2g}, and rose to "
            f"{curve.last:.3g} when the rate rose to {bad:.2g}", {"rate at the best step": good, "highest rate": bad},
            plots, 0.8)]
    return []
