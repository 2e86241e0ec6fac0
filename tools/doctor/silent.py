"""Runs whose loss has no unit that is known: that they have not learned is told by what their logs write down.

By NeMo's hypotheses, and by the validations' error rates. Standard library only.
"""

from __future__ import annotations

import math

from tools.doctor.finding import Finding
from tools.doctor.trace import EARLY_STEPS, LATE_STEPS, Trace, still_rising

ALL = 0.97  # share of hypotheses that are empty, or of words that are wrong
FEWEST, RATES = 6, 5  # hypotheses, and validations, that say something


def silent(trace: Trace, curve, causes_of, fix: list[str]) -> Finding | None:
    """Hypotheses that are empty to the log's end.

    Args:
        curve: trace.Shape, or None.
        causes_of: gives the ids of what explains a run that does not learn.
    """
    late = trace.hypotheses[len(trace.hypotheses) // 2:]
    share = sum(not text for text in late) / max(len(late), 1)
    if len(late) < FEWEST or share < ALL or trace.last_step and _steps(trace) < EARLY_STEPS:
        return None
    losses = trace.get("loss")
    causes = causes_of(trace) or ["run-nan"] * (bool(losses) and not math.isfinite(losses[-1][1]))
    return Finding(
        "run-collapse-blank", "note" if causes else "prevents" if _settled(trace, curve) else "warning",
        f"Of the last {len(late)} hypotheses in the log {share:.0%} are empty"
        + (f", up to step {trace.last_step}." if trace.last_step else ".")
        + (f" This follows from {', '.join(causes)}." if causes else ""),
        "Emitting blanks is the first thing CTC learns; by its log this run never left it, or fell back to it.",
        {"hypotheses": len(trace.hypotheses), "empty, of the later half": share, "last step": trace.last_step}, fix,
        0.7, plots=[trace.plot("Loss", {"loss": "train"}, "loss")] if losses else [])


def wordless(trace: Trace, curve, fix: list[str]) -> Finding | None:
    """Validations without a word right, long after the start; where a word is no whole utterance."""
    rates = trace.values("val_wer")
    if len(rates) < RATES or min(rates) < ALL or not _settled(trace, curve) or trace.counts_sentences:
        return None
    for_good = len(rates) >= 2 * RATES and _steps(trace) >= 5 * LATE_STEPS
    return Finding(
        "run-plateau", "prevents" if for_good else "warning",
        f"After {trace.last_step} steps none of {len(rates)} validations had a word error rate under {min(rates):.0%}.",
        "The model has learned nothing of the audio, or too little for a word.",
        {"best word error rate": min(rates), "loss at the end": curve.last, "last step": trace.last_step}, fix, 0.6,
        plots=[trace.plot("Loss", {"loss": "train"}, "loss"),
               trace.plot("Word error rate", {"val_wer": "validation"}, "WER")])


def _steps(trace: Trace) -> int:
    return trace.last_step - (trace.warmup or 0)


def _settled(trace: Trace, curve) -> bool:
    """Whether a run had its chance: long after its warm-up, and over or flat."""
    over = trace.ended or curve is not None and curve.flat
    return over and _steps(trace) >= LATE_STEPS and not still_rising(trace.get("lr"))
