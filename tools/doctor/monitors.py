"""What is watched and which way it should go: early stopping, the best checkpoint, a rate that falls on a plateau.

A rate of errors and a loss get better by falling. Imports no torch.
"""

from __future__ import annotations

import re

from tools.doctor.finding import Finding
from tools.doctor.languages import FEWEST, some
from tools.doctor.registry import NotExamined, check

FALLS, RISES = ("loss", "wer", "cer", "error"), ("acc", "bleu", "f1")
# Lightning's EarlyStopping.
STOPPED = re.compile(r"Monitored metric (\S+) did not improve in the last (\d+) records\. Best score: ([-\d.einfa]+?)\.? Signaling")
SAVED = re.compile(r"(EarlyStopping|ModelCheckpoint)\{'monitor': '([^']+)', 'mode': '(min|max)'")  # in a checkpoint
SPACES = 0.01  # share of a text's characters, under which it is not written in words; English has 0.18
SHORT = 6  # characters a text, on average: of single words or commands nothing is said
HIGHER = 1.02  # a best score by the lowest that was seen, from which on it is not the lowest


def turned_round(what: str, monitor: str | None, mode: str | None, key: str) -> Finding | None:
    """A finding where `mode` is the wrong way for what is monitored.

    Args:
        what: "early stopping", "the best checkpoint" or "the learning rate".
        key: where the mode is set.
    """
    name, mode = str(monitor or "").lower(), str(mode or "min").lower()
    right = "min" if any(word in name for word in FALLS) else "max" if any(word in name for word in RISES) else mode
    if mode == right or mode not in ("min", "max"):
        return None
    effect = {
        "early stopping": f"The run is ended as soon as {monitor} has got better a few times.",
        "the best checkpoint": f"The checkpoints that are kept are those with the worst {monitor}, the first ones; what is "
                               "averaged or exported from them has learned nothing.",
        "the learning rate": f"The rate is lowered whenever {monitor} gets better.",
    }[what]
    return Finding(
        "monitor-reversed", "warning" if what == "the best checkpoint" else "prevents",
        f"For {what} {monitor} is watched with mode={mode}: it gets better the other way.", effect,
        {"monitor": monitor, "mode": mode}, [f"{key}={right}"], 0.97, where=key)


@check("limits", faults=("metric-normalisation",), needs=("config",))
def rates_are_called_what_they_are(subject):
    """What is logged as a word error rate counts words, of texts that have words."""
    s = subject.settings
    key = s.key("model.use_cer")
    if (spaces := spaces_in(subject)) is not None and spaces < SPACES:
        if s.get("model.use_cer") is not True and not s.recipe:
            yield Finding(
                "metric-normalisation", "warning",
                f"The texts have {spaces:.1%} spaces, and {key} is not true: what is logged as val_wer counts whole texts.",
                "Without spaces (Mandarin, Japanese, Thai) a text is one word, wrong as a whole for one character: the rate "
                "stays near 1 while the model learns.",
                {"share of spaces": round(spaces, 5)}, [f"{key}=true"], 0.9, where=key)
        return
    if s.get("model.use_cer") is not True:
        return
    yield Finding(
        "metric-normalisation", "warning",
        f"{key}=true: what is logged as val_wer and wer counts characters.",
        "NeMo keeps the name of the word error rate for it. A character error rate is two to four times lower: next to "
        "anybody's WER the model looks far better than it is, and checkpoints named by val_wer carry it on.",
        {key: True}, [f"{key}=false", "or name it: exp_manager.checkpoint_callback_params.filename without val_wer"], 0.9,
        where=key)


def spaces_in(subject) -> float | None:
    """Share of spaces inside the texts of train; None where there are too few texts, or these are short."""
    texts = [row["text"].strip() for row in some(subject.rows.get("train", []))] if subject.has("manifests") else []
    letters = sum(map(len, texts))
    if len(texts) < FEWEST or letters < SHORT * len(texts):
        return None
    return sum(text.count(" ") for text in texts) / letters


@check("limits", faults=("monitor-reversed",), needs=("config",))
def monitors_of_the_configuration(subject):
    """What is watched goes the way that is better."""
    s = subject.settings
    if s.get("exp_manager") is None and s.get("model.optim.sched.monitor") is None:
        raise NotExamined("there is no exp_manager section")
    watched = []
    if s.get("exp_manager.create_early_stopping_callback"):
        watched.append(("early stopping", "exp_manager.early_stopping_callback_params"))
    if s.get("exp_manager.create_checkpoint_callback", True):
        watched.append(("the best checkpoint", "exp_manager.checkpoint_callback_params"))
    if str(s.get("model.optim.sched.name", "")) == "ReduceLROnPlateau":
        watched.append(("the learning rate", "model.optim.sched"))
    for what, key in watched:
        found = turned_round(what, s.get(f"{key}.monitor", "val_loss"), s.get(f"{key}.mode"), s.key(f"{key}.mode"))
        if found is not None:
            yield found


def monitors_of(trainer) -> list[Finding]:
    """The same of a live trainer's callbacks and schedules."""
    watched = [("early stopping", c.monitor, c.mode, "EarlyStopping(mode=...)") for c in trainer.early_stopping_callbacks]
    watched += [("the best checkpoint", c.monitor, getattr(c, "mode", None), "ModelCheckpoint(mode=...)")
                for c in trainer.checkpoint_callbacks if getattr(c, "monitor", None)]
    watched += [("the learning rate", config.monitor, getattr(config.scheduler, "mode", None), "ReduceLROnPlateau(mode=...)")
                for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]
    found = [turned_round(what, monitor, mode, key) for what, monitor, mode, key in watched]
    return [finding for finding in found if finding is not None]


@check("run", faults=("monitor-reversed",), needs=("run",))
def watched_the_right_way(subject):
    """What the run watched, to stop or to keep its best, went the way that is better."""
    from tools.doctor.checkpoints import callbacks_of, find
    from tools.doctor.explain import trace_of

    saved = [SAVED.match(name) for path in [p for p in find(subject.run) if p.suffix == ".ckpt"][-1:]
             for name in callbacks_of(path)]
    told = [turned_round("early stopping" if match[1] == "EarlyStopping" else "the best checkpoint", match[2], match[3],
                         f"{match[1]}(mode=...)") for match in saved if match]
    if any(told):
        yield from (finding for finding in told if finding is not None)
        return
    trace = trace_of(subject)
    stops = [match for _, line in trace.messages if (match := STOPPED.search(line))]
    if not stops:
        if not any(saved):
            raise NotExamined("neither a checkpoint nor a log says what was watched")
        return
    monitor, records, best = stops[-1][1], int(stops[-1][2]), float(stops[-1][3])
    seen = [value for _, value in trace.get(monitor)]
    if not any(word in monitor.lower() for word in FALLS) or not seen or best <= HIGHER * min(seen):
        return
    yield Finding(
        "monitor-reversed", "prevents",
        f"Early stopping ended the run at step {trace.last_step}: it took {best:g} for the best {monitor}, which had fallen "
        f"to {min(seen):g}.",
        "It waits for the value to rise (mode=max): the run is ended as soon as the model gets better.",
        {"best by early stopping": best, "lowest": min(seen), "patience": records},
        ["EarlyStopping(mode='min'), exp_manager.early_stopping_callback_params.mode=min"], 0.95, where="EarlyStopping",
        plots=[trace.plot(monitor, {monitor: "validation"}, monitor)])
