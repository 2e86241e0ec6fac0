"""What a run's curves say (family "run"): the same functions judge a run that is watched and one that is over.

Each rule takes a Trace and returns findings; `diagnose` runs them all. A plateau at the start is normal, so nothing
here says "prevents" for it before the run has had its chance. Standard library only.
"""

from __future__ import annotations

import math
from statistics import fmean, median

from tools.doctor.bands import outside
from tools.doctor.finding import Finding
from tools.doctor.nonfinite import NOT_SAID, non_finite
from tools.doctor.rates import learning_rate
from tools.doctor.registry import NotExamined, check
from tools.doctor.silent import silent, wordless
from tools.doctor.trace import EARLY_STEPS, LATE_STEPS, LEARNED, LETTERS_ONLY, OVER_STEPS, Trace, shape
from tools.doctor.unmoved import undone, unmoved, uphill

BLANK, LETTER = 0.97, 0.9
SLOW_DATA = 0.3
HEARD_CER = 0.6  # below it the audio was used
OTHER_UNIT = 5.0  # a first validation's loss by the train loss: above it is counted in another unit
CHARACTERS = ("; the texts have hardly any spaces, so the word error rate counts whole utterances: model.use_cer=true "
              "counts characters")
HIDDEN_WARNING, HIDDEN_STOPS = 0.001, 0.3  # share of utterances whose loss is infinite


def progress(trace: Trace) -> list[Finding]:
    """Plateau, collapse to blank or to one letter, divergence, or simply early."""
    curve = shape(trace)
    if (curve is None or curve.learned is None) and (found := silent(trace, curve, causes_of, _general(trace))):
        return [found]
    if curve is None:
        raise NotExamined("fewer than four losses")
    if curve.learned is None:
        if found := wordless(trace, curve, _general(trace)):
            return [found]
        raise NotExamined("the loss has an unknown unit, and no error rate says that it has learned: its plateau "
                          "cannot be told" + (CHARACTERS if trace.counts_sentences else ""))
    blank, letter = _late(trace, "blank_rate"), _late(trace, "letter_rate")
    plots = _progress_plots(trace)
    outputs = {"loss at the end": curve.last, "level of letters alone": curve.level, "last step": curve.last_step}
    if blank is not None:
        outputs["blank rate at the end"] = blank
    if letter is not None:
        outputs["share of the commonest letter among the other frames"] = letter
    if trace.bad is not None and curve.last_step < 50:
        return []  # it has hardly begun, and something else ended it
    if curve.lost:
        return [_diverged(trace, curve, blank, letter, outputs, plots)]
    if curve.learned or not curve.stuck:
        return []
    after = curve.last_step - (trace.warmup or 0)
    over = trace.ended and trace.planned is not None and trace.last_step >= 0.98 * trace.planned
    causes = causes_of(trace)
    if curve.last > 1.5 * curve.first and curve.last > 2 * curve.level and curve.last_step >= 20:
        return [_only_worse(curve, causes, outputs, plots)]
    if after < EARLY_STEPS and not causes and not (over and curve.last_step >= 1.5 * EARLY_STEPS):
        return [Finding(
            "run-early", "note",
            f"At step {curve.last_step} the loss ({curve.last:.3g}) is not below that of predicting letters without "
            f"listening ({curve.level:.3g}): every CTC run starts so.",
            "CTC first learns to emit blanks, then the commonest letters, and only then to listen.", outputs,
            ["the run is over: give it more steps" if over else
             f"wait until about step {(trace.warmup or 0) + 2 * EARLY_STEPS}, then look again"], 0.6, plots=plots)]
    stops = curve.flat and (after >= LATE_STEPS or (over and after >= OVER_STEPS))
    weight = "note" if causes else "prevents" if stops else "warning"
    follows = f" This follows from {', '.join(causes)}." if causes else ""
    top = f" ({trace.top_label!r})" if trace.top_label else ""
    general = _general(trace)
    if blank is not None and blank >= BLANK:
        return [Finding(
            "run-collapse-blank", weight,
            f"After {curve.last_step} steps {blank:.1%} of the frames are blank and the loss stays at "
            f"{curve.last:.3g}.{follows}",
            "Emitting blanks is the first thing CTC learns; this run never left it.", outputs, general, 0.7,
            plots=plots)]
    if letter is not None and letter >= LETTER:
        return [Finding(
            "run-collapse-letter", weight,
            f"After {curve.last_step} steps the model writes one letter{top}: {letter:.0%} of the frames that are not "
            f"blank, and the loss stays at {curve.last:.3g}.{follows}",
            "The output does not depend on what is heard: the best constant answer is the commonest letter.", outputs,
            general, 0.7, plots=plots)]
    above = curve.last > 1.2 * curve.level
    return [Finding(
        "run-plateau", weight,
        f"After {curve.last_step} steps the loss is {curve.last:.3g}, {'far above that' if above else 'that'} of "
        f"predicting letters without listening ({curve.level:.3g}).{follows}",
        "Not even how often letters occur has been learned." if above else
        "The model has learned how often letters occur and nothing of the audio.", outputs, general, 0.6, plots=plots)]


def _general(trace: Trace) -> list[str]:
    return [
        "python -m tools.ladder: can the model learn one batch? If not, the fault is in the model, the targets or "
        "the loss",
        "python -m tools.doctor check on the same configuration: model and data are probed",
        f"{trace.key('model.optim.lr')} three times lower, then three times higher",
    ]


def _only_worse(curve, causes: list[str], outputs: dict, plots) -> Finding:
    return Finding(
        "run-diverged", "note" if causes else "prevents" if curve.last_step >= 50 else "warning",
        f"The loss began at {curve.first:.3g} and is {curve.last:.3g} at step {curve.last_step}: it has only become "
        f"worse." + (f" This follows from {', '.join(causes)}." if causes else ""),
        "Steps go away from the minimum: they are too large, or the sign of the loss or of the gradient is turned "
        "round.", {"loss at the start": curve.first, **outputs},
        ["a tenth of the learning rate", "python -m tools.doctor check on the same configuration: the loss that is "
         "minimised is compared with CTC's"], 0.8, plots=plots)


def causes_of(trace: Trace) -> list[str]:
    """Ids of the causes that other rules name for a run that does not learn."""
    found: list[Finding] = []
    for rule in (non_finite, learning_rate, targets, hidden_losses, unmoved, undone, uphill):
        try:
            found += rule(trace)
        except NotExamined:
            continue
    return list(dict.fromkeys(f.id for f in found if f.weight == "prevents" and not f.id.startswith("run-")))


def _late(trace: Trace, name: str) -> float | None:
    values = trace.values(name, since=0.8)
    return median(values) if values else None


def _progress_plots(trace: Trace):
    characters = trace.loss_unit == "character"
    lines = {"loss": "train", "val_loss": "validation"} if characters and _same_size(trace) else {"loss": "train"}
    note = "Below the line of letters alone the model has begun to listen." if trace.level else ""
    plots = [trace.plot("Loss", lines, "nats a character" if characters else "loss", level=True, note=note)]
    rates = {
        "blank_rate": "blank", "letter_rate": "commonest letter of the rest", "val_blank_rate": "blank, validation",
    }
    if any(trace.get(name) for name in rates):
        plots.append(trace.plot("What the frames say", rates, "share of frames"))
    if trace.get("val_wer"):
        plots.append(trace.plot("Word error rate", {"val_wer": "validation"}, "WER"))
    return plots


def _same_size(trace: Trace) -> bool:
    """Whether the validation's loss is in the unit of the train loss, by its size: NeMo's is one of an utterance."""
    val = next(((s, v) for s, v in trace.get("val_loss") if math.isfinite(v)), None)
    losses = [(s, v) for s, v in trace.get("loss") if math.isfinite(v)]
    if val is None or not losses:
        return True
    then = [v for s, v in losses if s <= val[0]][-5:] or [losses[0][1]]
    floor = LETTERS_ONLY if trace.loss_unit == "character" else 0.0
    return val[1] <= OTHER_UNIT * max(median(then), trace.level or floor)


def _loss_plots(trace: Trace):
    """Train and validation loss: in one plot, or in two where their units differ."""
    if _same_size(trace):
        return [trace.plot("Loss", {"loss": "train", "val_loss": "validation"}, "loss")]
    return [trace.plot("Train loss", {"loss": "train"}, "loss"),
            trace.plot("Validation loss", {"val_loss": "validation"}, "loss")]


def _diverged(trace: Trace, curve, blank, letter, outputs, plots) -> Finding:
    outputs = {"best loss": curve.best, "at step": curve.best_step, "lost from step": curve.lost_step, **outputs}
    what = ""
    id_ = "run-diverged"
    if blank is not None and blank >= BLANK:
        id_, what = "run-collapse-blank", f", and {blank:.1%} of the frames are blank"
    elif letter is not None and letter >= LETTER and curve.level is not None and curve.last > 0.9 * curve.level:
        id_, what = "run-collapse-letter", f", and {letter:.0%} of the other frames are one letter"
    causes = causes_of(trace)
    return Finding(
        id_, "note" if causes else "prevents",
        f"The loss had reached {curve.best:.3g} at step {curve.best_step}; from step {curve.lost_step} on it is lost "
        f"again, {curve.last:.3g} at step {curve.last_step}{what}."
        + (f" This follows from {', '.join(causes)}." if causes else ""),
        "A late collapse: one or a few steps were large enough to leave the region in which the model worked. This "
        "is no start-up plateau.", outputs,
        [f"go on from a checkpoint before step {curve.best_step}, with {trace.key('model.optim.lr')} at a third",
         f"{trace.key('trainer.gradient_clip_val')}=1.0", f"{trace.key('trainer.precision')}=32 or bf16-mixed"],
        0.9, plots=plots)


def targets(trace: Trace) -> list[Finding]:
    """Targets that are nearly all one label."""
    share = trace.target_share
    if not share or trace.utterances_seen < 8:
        raise NotExamined("the targets were not seen")
    label, most = max(share.items(), key=lambda item: item[1])
    if most < 0.6 or len(share) > 200:
        return []
    space = label == " "
    return [Finding(
        "data-upper-case" if space else "data-characters", "prevents",
        f"{most:.0%} of all targets of the first {trace.utterances_seen} utterances are {label!r}: that is what the "
        "model will write.",
        "The text's letters are not among the labels and were dropped without a word; what is left are the spaces. "
        "LibriSpeech's own transcripts are upper-case." if space else
        "Most of the text was dropped, or all texts are the same.",
        {"share of each label": dict(sorted(share.items(), key=lambda item: -item[1])[:8])},
        ["lower-case the manifest's text (manifests.text.normalize), or normalize_transcripts=true in the data "
         "sections",
         "python -m manifests.validate MANIFEST names the lines"], 0.95 if space else 0.8, where="targets")]


def hidden_losses(trace: Trace) -> list[Finding]:
    """Infinite losses that zero_infinity turns into zeros."""
    if not trace.utterances_seen and not trace.infeasible_seen and "infeasible" not in trace.series:
        raise NotExamined("nothing counts infinite losses in these logs")
    count = max(trace.infeasible_seen, int(max(trace.values("infeasible"), default=0)))
    if not count or trace.zero_infinity is False:
        return []
    share = count / trace.utterances_seen if trace.utterances_seen else None
    which = {name: f"needs {need} frames, has {room}" for name, (need, room) in list(trace.infeasible.items())[:8]}
    heavy = share is not None and share > HIDDEN_STOPS
    light = share is not None and share < HIDDEN_WARNING
    said = f"{count} of {trace.utterances_seen}" if trace.utterances_seen else str(count)
    return [Finding(
        "infinite-loss-hidden", "prevents" if heavy else "note" if light else "warning",
        f"{said} utterances have an infinite loss: their targets do not fit into the frames that the model puts out.",
        "CTC needs a frame for each label and one more between equal neighbours. zero_infinity sets such a loss to "
        "0: nothing is learned from them, they still count in the mean, and nobody is told.",
        {"utterances": count, "share": share, "which": which},
        ["lower the encoder's subsampling factor, or use a larger sub-word vocabulary",
         "leave these utterances out; look whether their audio and text belong together"],
        0.95, where="loss")]


def overfitting(trace: Trace) -> list[Finding]:
    """Validation loss that rises while train loss falls."""
    train = shape(trace)
    if (by_heart := _only_by_heart(trace, train)) is not None:
        return [by_heart]
    val = [(s, v) for s, v in trace.get("val_loss") if math.isfinite(v)]
    if len(val) < 3 or train is None:
        raise NotExamined("fewer than three validations")
    best_step, best = min(val, key=lambda p: p[1])
    last_step, last = val[-1]
    falling = [v for s, v in trace.get("loss") if s <= best_step][-5:]
    if best_step == last_step or last < 1.15 * best or not falling or train.last > 0.9 * fmean(falling):
        return []
    wers = trace.get("val_wer")
    worse = not wers or wers[-1][1] > min(v for _, v in wers) * 1.02
    return [Finding(
        "run-overfitting", "warning" if worse else "note",
        f"Validation loss was {best:.3g} at step {best_step} and is {last:.3g} at step {last_step}, while the train "
        f"loss fell to {train.last:.3g}."
        + ("" if worse else " The word error rate has not risen with it: such a loss is often only over-sure."),
        "The model learns the train utterances by heart.",
        {"best validation loss": best, "at step": best_step, "last": last, "train loss": train.last},
        [f"keep the checkpoint of step {best_step}",
         "more SpecAugment (model.spec_augment.time_masks), dropout, weight decay",
         f"fewer steps: {trace.key('trainer.max_steps')}={best_step}"], 0.85,
        plots=_loss_plots(trace))]


def _only_by_heart(trace: Trace, train) -> Finding | None:
    """Train loss far down, and not a word of the validation right: more than ordinary overfitting."""
    wers = [(s, v) for s, v in trace.get("val_wer") if math.isfinite(v)]
    if not wers or train is None or not train.level or wers[-1][0] < 50 or wers[-1][1] < 0.9:
        return None
    if trace.counts_sentences or _validation_learned(trace, train.level):
        return None
    then = [v for s, v in trace.get("loss") if 0.8 * wers[-1][0] <= s <= wers[-1][0] and math.isfinite(v)]
    if not then or median(then) > 0.3 * train.level:
        return None
    return Finding(
        "run-overfitting", "warning",
        f"At step {wers[-1][0]} the train loss is {median(then):.3g}, and the word error rate of the validation is "
        f"{wers[-1][1]:.0%}: the train batches are known by heart and nothing else.",
        "Too few utterances; or the model's output depends on what a validation does not have: the other utterances "
        "of the batch, the padding, the statistics of train mode.",
        {"train loss": median(then), "validation WER": wers[-1][1], "steps": train.last_step},
        ["python -m tools.doctor check on the same configuration: batch-leak, padding-leak and train-eval-differ are "
         "probed", "more utterances"], 0.6,
        plots=[trace.plot("Train loss", {"loss": "train"}, "loss", level=True),
               trace.plot("Word error rate", {"val_wer": "validation"}, "WER")])


def _validation_learned(trace: Trace, level: float) -> bool:
    """Whether the validation has been learned too, whatever its word error rate: by its characters, else by its loss."""
    if cers := trace.values("val_cer"):
        return cers[-1] < HEARD_CER
    losses = trace.values("val_loss")
    return bool(losses) and losses[-1] < (LEARNED * level if _same_size(trace) else 0.5 * max(losses))


def slow_data(trace: Trace) -> list[Finding]:
    """Time spent waiting for the next batch."""
    waits = trace.values("wait")
    if not waits:
        raise NotExamined("no timing of the data loader")
    share = fmean(waits)
    if share < SLOW_DATA:
        return []
    workers = trace.settings.get("model.train_ds.num_workers") if trace.settings is not None else None
    if trace.settings is not None and trace.settings.get("model.train_ds.cache_features"):
        # The first pass over the data computes the features, in this process; the others find them in memory.
        late = trace.values("wait", since=0.7)
        if fmean(late) < SLOW_DATA:
            return []
        key = trace.key("model.train_ds.cache_features")
        return [Finding(
            "data-slow", "note", f"{share:.0%} of the time went into waiting for the next batch.",
            f"With {key} the first pass over the data computes the features, later ones find them in memory.",
            {"share of time waited": share, "at the end": fmean(late)},
            [f"none, if this run has only begun; if later passes wait too, {key}=false with workers"], 0.8, where=key,
            plots=[trace.plot("Share of the time spent waiting for data", {"wait": ""}, "share")])]
    return [Finding(
        "data-slow", "warning", f"{share:.0%} of the time went into waiting for the next batch.",
        "Reading and decoding audio does not keep up with the model.",
        {"share of time waited": share, "workers": workers},
        [f"{trace.key('model.train_ds.num_workers')}={max(2 * int(workers or 1), 2)}",
         "shards (tarred or Shar) instead of single files on a network disk", "pin_memory=true on a GPU"],
        0.9, where=trace.key("model.train_ds.num_workers"),
        plots=[trace.plot("Share of the time spent waiting for data", {"wait": ""}, "share")])]


def normal_band(trace: Trace) -> list[Finding]:
    """The curve against healthy runs of the same recipe and corpus."""
    if not trace.recipe or not trace.corpus:
        raise NotExamined("the run is not of a recipe and corpus of ours")
    return outside(trace)


RULES = {
    non_finite: ("run-nan", "explodes", "lr-too-high", "clip-missing", "features-bad", "precision-overflow"),
    targets: ("data-upper-case", "data-characters"),
    learning_rate: ("lr-zero", "lr-too-low", "lr-too-high", "warmup-too-long"),
    hidden_losses: ("infinite-loss-hidden",),
    unmoved: ("no-gradient",),
    undone: ("weights-not-moved",),
    uphill: ("step-uphill",),
    progress: ("run-plateau", "run-collapse-blank", "run-collapse-letter", "run-diverged"),
    overfitting: ("run-overfitting",),
    slow_data: ("data-slow",),
    normal_band: (),
}


def diagnose(trace: Trace) -> tuple[list[Finding], list[str], list[str]]:
    """(findings, faults ruled out, "rule: why not" for what could not be judged) of a trace by all rules."""
    found: list[Finding] = []
    ruled: list[str] = []
    missing: list[str] = []
    for rule, faults in RULES.items():
        try:
            new = rule(trace)
            found += new
            if not _undecided(rule, new):
                ruled += faults
        except NotExamined as reason:
            missing.append(f"run: {rule.__doc__.splitlines()[0].rstrip('.')}: {reason}")
    ids = {finding.id for finding in found}
    return _once(found), sorted(set(ruled) - ids), missing


def _undecided(rule, found: list[Finding]) -> str:
    """Why a rule that has said something has ruled out none of its other faults; "" where it has."""
    if rule is progress and any(finding.id == "run-early" for finding in found):
        return "too early to tell a plateau from the start"
    if rule is non_finite and any(finding.id == "run-nan" and finding.cause == NOT_SAID for finding in found):
        return "the logs say when, and not what made it so"
    return ""


def _once(findings: list[Finding]) -> list[Finding]:
    """One finding an id: the surest."""
    best: dict[str, Finding] = {}
    for finding in findings:
        if finding.id not in best or finding.confidence > best[finding.id].confidence:
            best[finding.id] = finding
    return list(best.values())


def _register() -> None:
    """Each rule as a check of the registry, on the trace that explain.py reads from the run's folder."""
    def made(rule, faults):
        def examine_run(subject):
            from tools.doctor.explain import trace_of

            trace = trace_of(subject)
            if not (trace.series or trace.bad or rule is progress and trace.hypotheses):
                raise NotExamined("no curve in this folder")
            if rule is non_finite and trace.reported & set(faults):
                return  # the callback has seen more than the curve shows
            found = rule(trace)
            yield from found
            if why := _undecided(rule, found):
                raise NotExamined(why)

        examine_run.__name__ = rule.__name__
        examine_run.__doc__ = rule.__doc__
        return examine_run

    for rule, faults in RULES.items():
        check("run", faults=faults, needs=("run",))(made(rule, faults))


_register()

# Further checks of this family: how it ended, the callback's report, the checkpoints.
from tools.doctor import checkpoints, explain  # noqa: E402, F401
