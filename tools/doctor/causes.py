"""Causes before effects: a fault shows in many properties at once, and only the first of them is to be mended."""

from __future__ import annotations

from dataclasses import replace

from tools.doctor.finding import WEIGHTS, Finding

CUT_SHORT = "rows whose audio is too short for their text"  # evidence of audio that was cut off, not of other texts

# cause -> what else it makes look wrong. Where both are found, the effect becomes a note that names its cause.
EFFECTS: dict[str, tuple[str, ...]] = {
    "batch-leak": (
        "padding-leak", "norm-padding", "time-scrambled", "train-eval-differ", "length-mismatch", "loss-wrong",
        "vanishes",
    ),
    "padding-leak": ("train-eval-differ", "norm-padding"),  # only a mask that hides speech in place of padding prevents
    "softmax-axis": (
        "not-log-probs", "batch-leak", "padding-leak", "time-scrambled", "loss-wrong", "vanishes", "norm-padding",
        "train-eval-differ",
    ),
    "not-log-probs": ("loss-wrong", "vanishes", "explodes", "train-eval-differ"),
    "output-constant": (
        "not-log-probs", "vanishes", "no-gradient", "time-scrambled", "padding-leak", "train-eval-differ",
        "loss-wrong",
    ),
    "time-scrambled": ("padding-leak", "norm-padding", "no-gradient", "vanishes"),
    "channels-alike": ("vanishes",),
    "length-mismatch": ("data-target-too-long", "loss-wrong", "length-ignored", "padding-leak"),
    "length-ignored": ("padding-leak", "norm-padding", "length-mismatch"),
    "blank-index": ("loss-wrong", "label-order", "tokenizer-vocabulary"),
    "label-order": ("tokenizer-vocabulary",),
    "frozen": ("no-gradient", "not-in-optimizer"),
    "no-gradient": ("vanishes",),
    "explodes": (
        "vanishes", "time-scrambled", "padding-leak", "train-eval-differ", "batch-leak", "output-constant",
        "norm-padding", "loss-wrong", "no-gradient", "run-nan",
    ),
    "features-bad": ("norm-padding", "explodes", "vanishes", "time-scrambled", "output-constant"),
    "vanishes": ("not-log-probs", "train-eval-differ", "time-scrambled"),
    "data-silence": ("features-bad", "data-scale"),
    "data-scale": ("features-bad",),
    "data-upper-case": ("tokenizer-vocabulary", "data-characters", "data-empty-text"),
    "data-mismatched-text": ("data-target-too-long", "run-overfitting"),
    "data-duration-wrong": ("data-target-too-long", "data-mismatched-text", "data-filtered"),
    "data-missing-audio": ("data-duration-wrong",),
    "data-characters": ("tokenizer-vocabulary",),
    "lr-zero": ("warmup-missing",),
    "step-uphill": ("lr-too-high", "run-diverged", "run-plateau", "run-nan", "explodes"),
    "lr-too-high": ("warmup-missing", "run-nan", "run-diverged"),
    "schedule-per-epoch": ("lr-too-low", "warmup-too-long"),
    "weights-not-moved": ("lr-too-low", "no-gradient", "run-plateau"),
    "warmup-too-long": ("lr-too-low",),
}


def _room_is_usual(finding: Finding) -> bool:
    """Whether targets usually fit well, so that those that do not are an exception with a reason of its own."""
    return float(finding.evidence.get("median fill", 1.0)) < 0.75


NORMS = "normalisations in eval mode"  # evidence of a model that was trained in eval mode

# Likewise where the cause is only a warning: the effect must be no graver, and the condition must hold for it.
OF_WARNINGS = {
    "time-scrambled": {"padding-leak": lambda finding: True},  # padding is carried to other times
    "layers-shared": {"train-eval-differ": lambda finding: True},  # a normalisation in them has two sets of statistics
    "data-sample-rate": {"features-bad": lambda finding: True},  # nothing above half of the true rate
    "data-mismatched-text": {"data-target-too-long": _room_is_usual},  # another, longer text
}


def _of_the_tokenizer(finding: Finding, findings: list[Finding]) -> bool:
    """Whether a model does not build for want of the tokenizer that another finding misses."""
    error = str(finding.evidence.get("error", ""))
    return finding.id == "model-does-not-build" and any(
        other.id == "tokenizer-vocabulary" and other.weight == "prevents" and "folder" in other.evidence
        and ("tokenizer" in error.lower() or other.evidence["folder"] is None and "NoneType" in error)
        for other in findings)


def _of_another_mode(finding: Finding, findings: list[Finding]) -> bool:
    """Whether a finding is of statistics that batches would have in training, and those were in eval mode all along."""
    return finding.id == "norm-padding" and "change of mean and variance" in finding.evidence and any(
        not str(other.evidence.get(NORMS, "0 of")).startswith("0 ") for other in findings if other.id == "train-eval-differ")


def merge(findings: list[Finding]) -> list[Finding]:
    """One finding a fault of the model: the surest stays, what the others saw is added to its evidence.

    Faults of data and runs stay apart, since each has its own file or step.
    """
    kept: dict[str, Finding] = {}
    out = []
    for finding in sorted(findings, key=lambda f: (WEIGHTS.index(f.weight), -f.confidence)):
        if finding.id.startswith(("data-", "run-", "metric-", "tokenizer-", "input-")):
            out.append(finding)
        elif finding.id not in kept:
            kept[finding.id] = finding
            out.append(finding)
        else:
            first = kept[finding.id]
            number = 1 + sum(key.startswith("also seen") for key in first.evidence)
            first.evidence[f"also seen {number}"] = finding.symptom
            first.plots.extend(finding.plots)
            first.fix.extend(change for change in finding.fix if change not in first.fix)
    return out


def with_source_of_nan(findings: list[Finding]) -> list[Finding]:
    """Findings of a run that became non-finite, with the unbounded recurrence of its model as what made it so.

    A model whose outputs can explode is a warning before training, and the cause of a run in which a value was not
    finite, unless the run shows that it began elsewhere.
    """
    nan = next((f for f in findings if f.id == "run-nan" and f.weight == "prevents"), None)
    if nan is None or any(f.id == "explodes" and f.weight == "prevents" for f in findings):
        return findings
    source = next((f for f in findings if f.id == "explodes" and _began_there(nan.where, f.where)), None)
    if source is None:
        return findings
    step = nan.evidence.get("first at step", "?")
    told = replace(
        source, weight="prevents", confidence=max(source.confidence, 0.9 if nan.where else 0.8),
        symptom=f"This run is not finite from step {step} on"
                + (f", first in {nan.where}, and that can explode. " if nan.where else ", and its model can explode. ")
                + source.symptom,
        evidence={"first at step": step, **source.evidence}, plots=[*nan.plots, *source.plots])
    return [told if f is source else f for f in findings]


# What can keep one batch from being learned, by the part without which it is learned.
OF_PART = {
    "step": ("loss-wrong", "length-mismatch", "no-gradient", "blank-index", "step-uphill"),
    "features": ("features-bad", "train-eval-differ"),
    "encoder": ("time-scrambled", "vanishes", "explodes", "no-gradient", "batch-leak", "padding-leak", "norm-padding",
                "output-constant", "train-eval-differ", "length-mismatch", "frozen", "step-uphill", "channels-alike"),
    "decoder": ("not-log-probs", "softmax-axis", "no-gradient", "output-constant", "blank-index", "vanishes"),
}


def with_part_at_fault(findings: list[Finding]) -> list[Finding]:
    """Findings of which a warning about the part that keeps one batch from being learned has become the cause of that."""
    batch = next((f for f in findings if f.id == "batch-not-learned"), None)
    known = [f for f in findings if f.weight == "warning" and f.confidence >= 0.7
             and batch is not None and f.id in OF_PART.get(batch.where, ())]
    if not known:
        return findings
    cause = max(known, key=lambda f: f.confidence)
    told = replace(cause, weight=batch.weight, evidence={**cause.evidence, "and so": batch.symptom})
    return [told if f is cause else as_effect(batch, [cause.id]) if f is batch else f for f in findings]


def as_effect(finding: Finding, causes: list[str]) -> Finding:
    """The finding as a note that names its causes."""
    return replace(finding, weight="note",
                   symptom=f"{finding.symptom} This follows from {', '.join(sorted(causes))}: mend that first.")


def _began_there(module: str, source: str) -> bool:
    """Whether a module (or a parameter of it, "" for not known) is the one that can explode, or inside or around it."""
    return not module or f"{module}.".startswith(f"{source}.") or f"{source}.".startswith(f"{module}.")


def name_causes(findings: list[Finding]) -> list[Finding]:
    """Findings with the effects of other findings turned into notes, causes first; order is kept otherwise."""
    findings = [f for f in findings if not _of_another_mode(f, findings)]
    findings = merge(with_part_at_fault(with_source_of_nan(findings)))
    stopping = {finding.id for finding in findings if finding.weight == "prevents"}
    # Of two that cause each other by this table none is the first: both stay.
    effects = dict(EFFECTS)
    if any(f.id == "time-scrambled" and "seconds late" in f.evidence for f in findings):
        # The probes' utterances are over before anything of them comes out: nothing of the input, and no gradient.
        effects["vanishes"] = tuple(id for id in EFFECTS["vanishes"] if id != "time-scrambled")
    first = {id for id in stopping if not any(id in effects.get(other, ()) for other in stopping - {id})}
    warned = {finding.id for finding in findings if finding.weight == "warning" and CUT_SHORT not in finding.evidence}
    out = []
    for finding in findings:
        causes = [cause for cause in first if cause != finding.id and finding.id in effects.get(cause, ())]
        if not causes and finding.weight == "warning":
            causes = [cause for cause in warned & set(OF_WARNINGS) if finding.id in OF_WARNINGS[cause]
                      and OF_WARNINGS[cause][finding.id](finding)]
        if _of_the_tokenizer(finding, findings):
            causes = ["tokenizer-vocabulary"]
        if causes and finding.weight != "note":
            finding = as_effect(finding, causes)
        out.append(finding)
    return out
