"""What a run that goes on from a checkpoint brings with it: labels, and a schedule that is over."""

from __future__ import annotations

from tools.doctor.finding import Finding
from tools.doctor.live import MOST_REHEARSED, rehearsed
from tools.doctor.trace import Trace

OVER = 0.02  # of the highest rate of a schedule: as good as its end
LONG = 0.2  # of a run, that is to go on at that


def other_labels(checkpoint: dict, labels: list[str]) -> list[Finding]:
    """A finding where the checkpoint that a run goes on from had the model's labels in another order, or others."""
    saved = checkpoint.get("hyper_parameters") or {}
    saved = saved.get("cfg", saved)  # NeMo's
    decoder = saved.get("decoder") or {}
    before = [str(label) for label in decoder.get("vocabulary") or saved.get("labels") or []]
    if not before or not labels or before == labels:
        return []
    kind = "in another order" if sorted(before) == sorted(labels) else f"{len(before)} others"
    differ = [i for i in range(min(len(before), len(labels))) if before[i] != labels[i]]
    return [Finding(
        "label-order", "prevents",
        f"The checkpoint that this run goes on from was trained with labels {kind}: where it says "
        f"{before[differ[0]]!r}, {labels[differ[0]]!r} is written now." if differ else
        f"The checkpoint that this run goes on from was trained with {len(before)} labels; now there are {len(labels)}.",
        "The weights of the decoder belong to label numbers, not to letters: what had been learned is read as other "
        "letters, and has to be unlearned.",
        {"labels that differ": len(differ), "in the checkpoint": before[:40], "now": labels[:40]},
        ["model.labels in the order of the checkpoint's hyper_parameters; or start anew, in another folder"], 0.95,
        where="model.labels")]


def schedule_over(trainer, trace: Trace) -> list[Finding]:
    """A finding where a restored schedule has come to its end, and much of the run is still to come."""
    left = (trace.planned or 0) - trainer.global_step
    if trainer.global_step == 0 or trace.planned is None or left < LONG * trace.planned:
        return []
    for config in trainer.lr_scheduler_configs:
        base = max((float(rate) for rate in getattr(config.scheduler, "base_lrs", [])), default=0.0)
        if config.reduce_on_plateau or config.interval != "step" or base <= 0:
            continue
        try:
            highest = max(rehearsed(config.scheduler, min(left, MOST_REHEARSED)))
        except Exception:  # anybody's schedule
            continue
        if highest >= OVER * base:
            continue
        return [Finding(
            "lr-too-low", "prevents",
            f"The run goes on from step {trainer.global_step} with a schedule that is over: in the {left} steps to come the rate "
            f"is {highest:.2g} at the most, of {base:.2g}.",
            "fit(ckpt_path=...) restores the schedule too, with the number of steps that it was made for: the new plan is not "
            "looked at.",
            {"step": trainer.global_step, "steps to come": left, "highest rate to come": highest, "of the schedule": base,
             "schedule": type(config.scheduler).__name__},
            ["init_from_ptl_ckpt=... or init_from_nemo_model=... (weights alone, a schedule of its own) in place of ckpt_path",
             "to go on with the same run: the max_steps that the schedule had"], 0.9,
            where=trace.key("model.optim.sched"))]
    return []
