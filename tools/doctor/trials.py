"""What is left from a trial or another training: a few batches in place of the data, modules that stay frozen.

From the configuration; no torch."""

from __future__ import annotations

from tools.doctor.finding import Finding
from tools.doctor.registry import NotExamined, check
from tools.doctor.schedule import plan
from tools.doctor.trained import started_from

SMALL = 0.5  # share of the train batches, under which the limit is said


@check("limits", faults=("data-filtered",), needs=("config",))
def trainer_takes_all(subject):
    """The trainer takes all of the data, not the few batches of a trial."""
    s = subject.settings
    if s.get("trainer") is None:
        raise NotExamined("there is no trainer section")
    given = {name: s.get(f"trainer.{name}") for name in ("fast_dev_run", "overfit_batches", "limit_train_batches")}
    try:
        batches = plan(subject).steps_a_pass
        batches = batches and batches * plan(subject).accumulate
    except NotExamined:
        batches = None
    found = left_from_a_trial(given, batches, s.key("trainer"))
    if found is not None:
        yield found


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
