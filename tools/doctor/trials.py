"""What is left from a trial or another training: a few batches in place of the data, modules that stay frozen.

From the configuration; no torch."""

from __future__ import annotations

import math
import os
from pathlib import Path

from tools.doctor.finding import Finding
from tools.doctor.languages import some
from tools.doctor.registry import NotExamined, check
from tools.doctor.schedule import plan
from tools.doctor.tokenizer import parts
from tools.doctor.trained import started_from

AN_EPOCH = 50  # batches, fewer are no epoch of anybody's
SMALL = 0.5  # share of the train batches, under which the limit is said


@check("limits", faults=("data-filtered",), needs=("config",))
def trainer_takes_all(subject):
    """The trainer takes all of the data, not the few batches of a trial."""
    s = subject.settings
    if s.get("trainer") is None:
        raise NotExamined("there is no trainer section")
    given = {name: s.get(f"trainer.{name}") for name in ("fast_dev_run", "overfit_batches", "limit_train_batches")}
    try:
        p = plan(subject)
        batches = p.steps_a_pass and p.steps_a_pass * p.accumulate
    except NotExamined:
        p = batches = None
    if p is not None and is_epoch_by_number(s, given["limit_train_batches"], batches, p.accumulate):
        given["limit_train_batches"] = None
    found = left_from_a_trial(given, batches, s.key("trainer"))
    if found is not None:
        yield found


def is_epoch_by_number(s, limit, batches: float | None, accumulate: int) -> bool:
    """Whether `limit_train_batches` is meant to be an epoch of some batches, of data that is passed through all the same:
    each takes others of what was shuffled."""
    if isinstance(limit, bool) or not isinstance(limit, (int, float)):
        return False
    if isinstance(limit, float):
        limit = limit * batches if batches else 0
    if limit < AN_EPOCH:
        return False
    if s.reader("train") == "lhotse":  # whose sampler goes on where it was, or never ends
        return True
    epochs, steps = s.number("trainer.max_epochs", -1), s.number("trainer.max_steps", -1)
    taken = min(limit * epochs if epochs > 0 else math.inf, steps * accumulate if steps > 0 else math.inf)
    return bool(s.get("model.train_ds.shuffle")) and bool(batches) and batches <= taken < math.inf


def left_from_a_trial(given: dict, batches: float | None, key: str = "trainer") -> Finding | None:
    """A finding where Lightning's `fast_dev_run`, `overfit_batches` or `limit_train_batches` leaves little of an epoch
    of so many batches of a device (None: not known). A float is a share, an int a number of batches."""
    for name in ("fast_dev_run", "overfit_batches", "limit_train_batches"):
        value = given.get(name)
        if not isinstance(value, (int, float)) or value is True and name != "fast_dev_run" or not value:
            continue
        if isinstance(value, float) and name != "fast_dev_run":
            share, taken = value, f"{value:.1%} of the batches"
        else:
            share = None if not batches else value / batches
            taken = f"{int(value)} batch{'' if value == 1 else 'es'}" + (f" of {batches:.0f}" if batches else "")
        if name != "fast_dev_run" and share is not None and share >= SMALL:
            continue
        if share is None and name == "limit_train_batches" and value >= 1000:
            continue  # epochs of a number of batches, of data of whatever size
        again = "the same in each epoch" if name == "overfit_batches" else "of each epoch"
        dev = name == "fast_dev_run"
        return Finding(
            "data-filtered", "prevents" if dev else "warning",
            f"{key}.{name}={value}: the run is a trial of {taken}, and keeps no checkpoint." if dev else
            f"{key}.{name}={value}: of the train data {taken} {'are' if value != 1 else 'is'} used, {again}.",
            "It is for trying a program out. What is trained so has heard next to nothing: it learns that by heart, or ends "
            "before it has left its first plateau.",
            {name: value, "batches of an epoch": batches and round(batches)},
            [f"take {key}.{name} out"], 0.9, where=f"{key}.{name}")
    return None


@check("limits", faults=("data-filtered",), needs=("config", "manifests"))
def options_keep_the_rows(subject):
    """No option of the train section leaves most of its rows out."""
    s, rows = subject.settings, subject.rows.get("train", [])
    if s.recipe:
        return
    reader, key = s.reader("train"), s.key("model.train_ds")
    low, high = s.number("model.train_ds.min_duration", 0.0), s.number("model.train_ds.max_duration", math.inf)
    kept = sum(low <= row["duration"] <= high for row in rows)
    most = s.number("model.train_ds.max_utts", 0)
    if reader == "nemo" and not s.get("model.train_ds.is_tarred") and 0 < most < SMALL * kept:
        yield _left_out(
            f"{key}.max_utts={most:g} takes the first {most:g} of the {kept} utterances of train.",
            {"max_utts": most, "utterances": kept}, f"take {key}.max_utts out", f"{key}.max_utts")
    if reader != "lhotse":
        return
    manifests = subject.manifests.get("train", [])
    skipped = sum(subject.skipped.get(os.path.normpath(path), 0) for path in manifests)
    if skipped > SMALL * (skipped + len(rows)):
        yield _left_out(
            f"{skipped} of {skipped + len(rows)} rows of train say `_skipme`: lhotse's loader leaves them out.",
            {"rows": skipped, "of": skipped + len(rows)}, "take the field out of the rows that are to be learned",
            manifests[0], stops=not rows)
    yield from _left_by_rate(subject, rows, key)


def _left_by_rate(subject, rows: list[dict], key: str):
    """What lhotse's limits of tokens a second leave out. Of characters NeMo counts none: it hands lhotse no tokenizer."""
    s = subject.settings
    low, high = s.number("model.train_ds.min_tps", -1.0), s.number("model.train_ds.max_tps", math.inf)
    if s.get("model.tokenizer") is None or s.get("model.train_ds.pretokenize") is False or low <= 0 and high == math.inf:
        return
    found = parts(s)
    if not all(part.kind == "bpe" and Path(part.path).is_file() for part in found):
        raise NotExamined(f"{key}.min_tps and max_tps count tokens of a tokenizer that is not here, or of word pieces")
    import sentencepiece

    models = {part.language: sentencepiece.SentencePieceProcessor(model_file=part.path) for part in found}
    texts = [(row, models.get("") or models.get(row.get("lang"))) for row in some(rows)]
    rates = sorted(len(model.encode(row["text"])) / row["duration"] for row, model in texts if model is not None)
    slow, fast = sum(rate < low for rate in rates), sum(rate > high for rate in rates)
    if slow + fast <= SMALL * len(rates):  # of no rows too
        return
    name, limit = ("min_tps", low) if slow > fast else ("max_tps", high)
    yield _left_out(
        f"{key}.{name}={limit:g} leaves out {slow + fast} of {len(rates)} utterances of train: they have "
        f"{rates[len(rates) // 2]:.1f} tokens a second (median).",
        {"slower": slow, "faster": fast, "of": len(rates)}, f"take {key}.{name} out", f"{key}.{name}",
        stops=slow + fast == len(rates))


def _left_out(symptom: str, evidence: dict, fix: str, where: str, stops: bool = False) -> Finding:
    return Finding(
        "data-filtered", "prevents" if stops else "warning", symptom,
        "It is left from a trial or from other data. Loaders leave rows out without a word: the model learns by heart what "
        "is left, and validation gets no better.", evidence, [fix], 0.9, where=where)


@check("limits", faults=("frozen",), needs=("config",))
def freezing_ends(subject):
    """What NeMo freezes for some steps (freeze_updates) is trained for most of the run."""
    s = subject.settings
    if not s.get("model.freeze_updates.enabled"):
        return
    steps = plan(subject).steps
    for module, until in dict(s.get("model.freeze_updates.modules") or {}).items():
        begin, end = (0, until) if isinstance(until, int) else tuple(until)
        if end != -1 and steps is None:
            raise NotExamined(f"{module} is frozen until step {end}, of a number that is not known")
        if begin > 0.5 * (steps or begin + 1) or end != -1 and end - begin < 0.5 * steps:
            continue
        whole = end == -1 or end >= 0.9 * steps
        started = started_from(s)
        key = s.key(f"model.freeze_updates.modules.{module}")
        yield Finding(
            "frozen", "warning" if started or not whole else "prevents",
            f"{key}={until}: {module} is frozen " + ("for the whole run" if whole else f"until step {end}")
            + (f" of {steps} steps." if steps else "."),
            "It keeps the values that it has. " + (f"They may be trained ones ({started})." if started else
            "Random weights that are frozen learn nothing; what comes behind them learns to guess."),
            {"frozen until step": end, "steps of the run": steps}, [f"{key}={max((steps or 1000) // 100, 1)}, or "
            f"{s.key('model.freeze_updates.enabled')}=false"], 0.95, where=key)
