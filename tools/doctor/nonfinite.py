"""What made a run non-finite: from the step at which it began, as the callback saw it or as the logs tell it.

Standard library only. The three things that people try first and that do not help are said with the finding:
zero_infinity acts on an infinite loss only; clipping divides by the norm, and a norm that is not finite spreads to
every parameter; skipping such batches keeps the weights and changes nothing in the module that makes them.
"""

from __future__ import annotations

import math

from tools.doctor.finding import Finding, Plot
from tools.doctor.registry import NotExamined
from tools.doctor.trace import BadStep, Trace

WHY_NOT_ZERO_INFINITY = (
    "zero_infinity does not help: it sets an infinite loss to 0, and a loss of NaN log-probs is NaN, not infinite"
)
WHY_NOT_CLIP = (
    "clipping does not help: it scales by limit / norm, and a norm that is not finite makes every gradient NaN, so "
    "one such step spreads NaN to all parameters"
)
NOT_SAID = "The logs do not say where it began."
SCALER_PATIENCE = 10  # steps: a gradient scaler for float16 looks for its scale by overflowing
CURVES = (("loss", "loss"), ("grad_norm", "gradient norm"), ("val_loss", "validation loss"))  # series, in words
GROWTH = 20.0  # an output so much larger in its last frames than in its first grows with time


def non_finite(trace: Trace) -> list[Finding]:
    """Where the run became NaN or infinite, by its cause."""
    bad = trace.bad or _from_curve(trace)
    if bad is None:
        if not any(trace.get(name) for name, _ in CURVES):
            raise NotExamined("no loss and no gradient norm were seen")
        return []
    plots = _plots(trace, bad)
    evidence = {"first at step": bad.step, "what": bad.what}
    place = trace.places.get(bad.step, "")
    if place:
        evidence["where the log has it"] = place
    if bad.module:
        evidence["first module or parameter"] = f"{bad.module} ({bad.kind})" if bad.kind else bad.module
    times = max(trace.bad_steps, _flags(trace, bad).count(False))
    if times > 1:
        evidence["steps that were not finite"] = times
    if bad.utterances:
        evidence["utterances of that batch"] = bad.utterances
    evidence.update(bad.details)
    cause = _cause(trace, bad, evidence, plots)
    if cause is not None:
        return [cause]
    here = f"{bad.module} ({bad.kind})" if bad.kind else bad.module
    passed = times <= 1 and (trace.bad_steps == 1 or bad.what == "validation loss") or _survived(trace, bad)
    return [Finding(
        "run-nan", "warning" if passed else "prevents",
        (f"The {bad.what} is not finite from step {bad.step} on{f' ({place})' * bool(place)}" if not passed else
         f"The {bad.what} was not finite at step {bad.step}, once" if times <= 1 else
         f"The {bad.what} was not finite at {times} steps, first at step {bad.step}; at the end it is finite")
        + (f": the first output that is not finite is that of {here}." if bad.origin == "forward" else "."),
        _where_from(bad), evidence, _fixes(trace, bad),
        0.9 if bad.origin != "unknown" else 0.5, where=bad.module, plots=plots,
    )]


def _from_curve(trace: Trace) -> BadStep | None:
    """What is not finite in a curve: first what stays so to the end, then what was so in between."""
    seen = []
    for name, what in CURVES:
        if bad := _not_finite(trace, name):
            points = [step for step, _ in trace.get(name)]
            last_good = max((step for step in points if step not in bad), default=-1)
            stays = [step for step in points if step > last_good]
            first = BadStep(min(stays or bad), what)
            seen.append((_survived(trace, first), first.step, what))
    return BadStep(*min(seen)[1:]) if seen else None


def _not_finite(trace: Trace, name: str) -> set[int]:
    """Steps at which a series is not finite, without those at which a gradient scaler only looks for its scale."""
    points = trace.get(name)
    bad = {step for step, value in points if not math.isfinite(value)}
    if name != "grad_norm" or not trace.precision.startswith("16") or trace.precision == "16-true":
        return bad
    lasting: set[int] = set()
    row: list[int] = []
    for step, _ in points:
        row = [*row, step] if step in bad else []
        if len(row) >= SCALER_PATIENCE:
            lasting.update(row)
    return lasting


def _flags(trace: Trace, bad: BadStep) -> list[bool]:
    """Whether each step that was logged from the bad one on is finite: of the validation's loss, or in training."""
    found: dict[int, bool] = {}
    for name in ("val_loss",) if bad.what == "validation loss" else ("loss", "grad_norm"):
        broken = _not_finite(trace, name)
        for step, _ in trace.get(name):
            if step >= bad.step:
                found[step] = found.get(step, True) and step not in broken
    return [found[step] for step in sorted(found)]


def _survived(trace: Trace, bad: BadStep) -> bool:
    """Whether the run went on, finite at its end and in most of its steps: such batches were skipped, or few."""
    flags = _flags(trace, bad)
    many = flags.count(False) > 0.5 * len(flags) or trace.bad_steps > 0.5 * (trace.last_step - bad.step + 1)
    return bool(flags) and flags[-1] and not many


def _cause(trace: Trace, bad: BadStep, evidence: dict, plots: list[Plot]) -> Finding | None:
    """The fault behind it where that can be told."""
    here = f"{bad.module} ({bad.kind})" if bad.kind else bad.module
    if bad.origin in ("audio", "features"):
        what = "The audio itself" if bad.origin == "audio" else f"The output of the preprocessor ({here})"
        return Finding(
            "features-bad", "prevents", f"{what} is not finite at step {bad.step}: the loss follows.",
            "A recording with NaN samples, or a silent stretch divided by its own variance of 0. One such input also "
            "poisons BatchNorm's running statistics for good.", evidence,
            ["find and drop these recordings: python -m tools.doctor check --train MANIFEST --only data",
             f"{trace.key('model.preprocessor.dither')}=1e-5 keeps silence from having variance 0"],
            0.95, where=bad.module or "audio", plots=plots)
    if bad.origin == "loss":
        return _infinite_loss(trace, bad, evidence, plots)
    half = trace.precision.startswith("16") or bad.details.get("dtype") == "float16"
    if half and bad.origin in ("forward", "backward"):
        return Finding(
            "precision-overflow", "warning" if _survived(trace, bad) else "prevents",
            f"{here or 'A module'} leaves the range of float16 at step {bad.step}: largest finite value 65504.",
            "float16 holds nothing above 65504. Attention scores, unnormalised recurrences and log-probs leave it.",
            evidence, [f"{trace.key('trainer.precision')}=bf16-mixed", f"{trace.key('trainer.precision')}=32"],
            0.85, where=bad.module, plots=plots)
    grown = _growth(bad)
    if bad.origin == "forward" and (grown is not None or _deep(bad)):
        return _explodes(trace, bad, here, grown, evidence, plots)
    if bad.origin == "parameters":
        return _parameters(trace, bad, evidence, plots)
    if bad.origin == "backward":
        evidence = {**evidence, "why clipping does not help": WHY_NOT_CLIP}
        return Finding(
            "run-nan", "warning" if _survived(trace, bad) else "prevents",
            f"The loss is finite at step {bad.step} and the gradient is not: nearest to the loss, it is so in {here}.",
            "A derivative that is infinite where the value is not: sqrt or log at 0, a division by a norm of 0, a "
            "mask of -inf over a whole row, or a gradient that explodes through a recurrence.", evidence,
            [f"look at {bad.module} for sqrt, log, norm, division and softmax over masked rows; add an eps",
             "torch.autograd.set_detect_anomaly(True) for one step gives the line"], 0.85, where=bad.module,
             plots=plots)
    if bad.origin == "unknown" and not _survived(trace, bad):
        return _from_history(trace, bad, evidence, plots)
    return None


def _explodes(trace: Trace, bad: BadStep, here: str, times: float | None, evidence: dict, plots: list[Plot]) -> Finding:
    """A module whose output is infinite or very large: over time (`times` from one end to the other), or by depth."""
    if times is not None:
        how = f"its output grows {times:.3g} times from one end of time to the other"
        why = ("A recurrence without a bound (ReLU) and without normalisation multiplies its state at each frame: over "
               "a factor of 1 it grows exponentially, and a longer utterance grows further.")
        first = f"use a gated or bounded recurrence in {bad.module}: nn.GRU, nn.LSTM, or nonlinearity='tanh'"
    else:
        how = "the outputs grow from module to module"
        why = "Nothing between the layers keeps the scale: each multiplies what the one before gives it."
        first = f"put a normalisation (LayerNorm) before {bad.module}"
    given = "; what it was given and its parameters are finite" if bad.inputs_finite else ""
    largest = bad.details.get("largest output of that module", math.nan)
    what = f"reaches {largest:.2g}" if math.isfinite(largest) else "is not finite"
    return Finding(
        "explodes", "prevents",
        f"{here} is the first module whose output {what}, at step {bad.step}: {how}{given}.", why,
        {**evidence, "why the usual cures fail": [WHY_NOT_ZERO_INFINITY, WHY_NOT_CLIP]},
        [first, "normalise between layers: LayerNorm on the input of each recurrent layer",
         f"a lower {trace.key('model.optim.lr')} only delays it"],
        0.95, where=bad.module, plots=plots)


def _infinite_loss(trace: Trace, bad: BadStep, evidence: dict, plots: list[Plot]) -> Finding:
    too_long = {name: f"needs {need} frames, has {room}" for name, (need, room) in list(trace.infeasible.items())[:8]}
    if too_long:
        return Finding(
            "data-target-too-long", "prevents",
            f"The loss is infinite at step {bad.step}: {trace.infeasible_seen} targets do not fit into the output "
            "frames.",
            "CTC needs a frame for each label and one more between equal neighbours. Where there are fewer frames no "
            "path exists and the loss is infinite.", {**evidence, "which": too_long},
            ["leave these utterances out of the manifest (and look whether text and audio belong together)",
             "lower the encoder's subsampling factor, or use a larger sub-word vocabulary",
             "zero_infinity=True in the CTC loss hides them: count them too"], 0.95, where="loss", plots=plots)
    return Finding(
        "loss-wrong", "prevents",
        f"The log-probs are finite at step {bad.step} and every target fits, but the loss is "
        f"{bad.details.get('loss')}.",
        "The loss divides by a length or weight of 0, or takes a logarithm of 0.", evidence,
        ["look at the reduction of the loss: an empty target counts 0 in its mean"], 0.6, where="loss", plots=plots)


def _parameters(trace: Trace, bad: BadStep, evidence: dict, plots: list[Plot]) -> Finding | None:
    norm = bad.details.get("gradient norm of the step before")
    update = trace.values("update")
    if isinstance(norm, float) and math.isfinite(norm) and update and max(update) > 0.3:
        return lr_too_high(trace, f"parameters became non-finite in the step before step {bad.step} although its "
                           f"gradient norm was finite ({norm:.3g})", evidence, plots, 0.85)
    evidence = {**evidence, "why clipping does not help": WHY_NOT_CLIP}
    return Finding(
        "run-nan", "prevents",
        f"Parameters were not finite before step {bad.step} began, first {bad.module}: the step before spoilt them.",
        "A gradient that was not finite went into the optimizer.", evidence,
        _general_fixes(trace), 0.8, where=bad.module, plots=plots)


def _from_history(trace: Trace, bad: BadStep, evidence: dict, plots: list[Plot]) -> Finding | None:
    """From a curve alone: what the steps before the first bad one say."""
    before = [v for s, v in trace.get("grad_norm") if s < bad.step and math.isfinite(v)]
    losses = [v for s, v in trace.get("loss") if s < bad.step and math.isfinite(v)]
    rates = [v for s, v in trace.get("lr") if s <= bad.step]
    if len(losses) >= 6 and len(before) >= 6:
        usual = sorted(before)[len(before) // 2]
        if before[-1] > 20 * usual or losses[-1] > 3 * min(losses):
            evidence = {**evidence, "gradient norm just before": before[-1], "usual gradient norm": usual,
                        "loss just before": losses[-1], "best loss before": min(losses)}
            if rates and rates[-1] >= 0.999 * max(rates):
                what = (f"the loss had grown from {min(losses):.3g} to {losses[-1]:.3g} and the gradient norm from "
                        f"{usual:.3g} to {before[-1]:.3g} when it became non-finite at step {bad.step}")
                return lr_too_high(trace, what, evidence, plots, 0.7)
            if trace.clip == 0:
                return Finding(
                    "clip-missing", "prevents",
                    f"The gradient norm was {before[-1]:.3g}, usually {usual:.3g}, just before step {bad.step}, at "
                    "which the loss is not finite; nothing clips it.",
                    "A rare batch gives a gradient many times the usual one, and one such step throws the weights "
                    "away.",
                    evidence, [f"{trace.key('trainer.gradient_clip_val')}={2 * usual:.2g}"], 0.65,
                    where=trace.key("trainer.gradient_clip_val"), plots=plots)
    return None


def lr_too_high(trace: Trace, symptom: str, evidence: dict, plots: list[Plot], confidence: float,
                weight: str = "prevents") -> Finding:
    """The finding of a learning rate that is too high, with the rate to try."""
    rates = trace.values("lr")
    peak = max(rates, default=None)
    evidence = dict(evidence)
    if peak is not None:
        evidence["peak learning rate"] = peak
    key = trace.key("model.optim.lr")
    suggestion = f"{key}={peak / 10:.1g}" if peak else f"a tenth of {key}"
    return Finding(
        "lr-too-high", weight, f"Steps are too large: {symptom}.",
        "Each step moves the weights by more than the gradient holds for: the loss is thrown about, outputs "
        "saturate, and the model ends at a constant output or at NaN.", evidence,
        [f"{suggestion} (a Noam schedule's lr is a multiplier, not a rate)",
         f"a warm-up of 5 to 10 % of the steps: {trace.key('model.optim.sched.warmup_steps')}"],
        confidence, where=key, plots=plots)


def _growth(bad: BadStep) -> float | None:
    """How much larger the traced output is at one end of time than at the other, up to where it is not finite.

    A recurrence that runs backwards grows towards the first frame, also where its output is added to that of one that
    runs ahead. None where the output does not grow.
    """
    if bad.growth is None:
        return None
    values = [v for v in bad.growth[1] if v != 0]  # zeros are padding, at either end
    finite = [v for v in values if math.isfinite(v) and v > 0]
    first, last = (not math.isfinite(values[k]) for k in (0, -1)) if values else (False, False)
    if len(finite) < 3 or not (first or last or all(map(math.isfinite, values))):
        return None  # it breaks elsewhere than at an end to which it would grow
    if first and last:  # both directions do
        times = max(finite) / min(finite)
    else:
        ways = ([] if first else [finite]) + ([] if last else [finite[::-1]])
        times = max((max(way) / way[0] for way in ways if way.index(max(way)) >= len(way) // 2), default=0.0)
    return times if times > GROWTH else None


def _deep(bad: BadStep) -> bool:
    finite = [v for _, v in bad.depth if math.isfinite(v) and v > 0]
    return len(finite) >= 3 and max(finite) > 1e6


def _where_from(bad: BadStep) -> str:
    return {
        "forward": f"{bad.module} ({bad.kind}) makes it: what it was given and its parameters are finite.",
        "unknown": NOT_SAID,
    }.get(bad.origin, f"It began in the {bad.origin}.")


def _fixes(trace: Trace, bad: BadStep) -> list[str]:
    if bad.origin == "unknown":
        return ["attach the doctor's callback, which names the first module: "
                "Trainer(callbacks=[tools.doctor.Doctor()])",
                *_general_fixes(trace)]
    if bad.origin == "forward" and bad.module:
        return [f"look in {bad.module} for a division, log, sqrt, exp or norm that can meet 0 or overflow; add an eps "
                "or a bound",
                *_general_fixes(trace)]
    return _general_fixes(trace)


def _general_fixes(trace: Trace) -> list[str]:
    return [f"a tenth of {trace.key('model.optim.lr')}, with a warm-up", f"{trace.key('trainer.precision')}=32",
            f"{trace.key('trainer.gradient_clip_val')}=1.0 (it does not help against a norm that is already "
            "non-finite)"]


def _plots(trace: Trace, bad: BadStep) -> list[Plot]:
    plots = []
    if trace.values("loss"):
        plots.append(trace.plot("Loss until it was not finite", {"loss": "loss"}, "loss", level=True))
    if trace.values("grad_norm"):
        plots.append(trace.plot("Gradient norm", {"grad_norm": "before clipping"}, "norm"))
    if bad.growth is not None:
        plots.append(Plot(f"Largest output of {bad.module} over time", "frame", "largest absolute value",
                          {"": bad.growth}, "A stable recurrence keeps one level."))
    if len(bad.depth) > 3:
        plots.append(Plot("Largest output of each module, in order of execution", "module", "largest absolute value",
                          {"": (list(range(1, len(bad.depth) + 1)), [v for _, v in bad.depth])},
                          f"the last is {bad.depth[-1][0]}"))
    return plots
