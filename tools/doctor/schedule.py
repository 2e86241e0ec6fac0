"""The schedule and what goes with it, from the configuration alone: learning rate, warm-up, batch, clipping, precision.

Rates are in absolute units: Noam's multiplier is resolved. No torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from omegaconf import DictConfig, ListConfig

from tools.doctor.finding import Finding, Plot
from tools.doctor.registry import NotExamined, check

# Peak learning rates by optimizer: under the first nothing moves within a usual run, over the second it is unusual,
# over the third training diverges. Published: AdamW-like 1e-4 to 5e-3 (AlgoPerf), NovoGrad 0.01 to 0.05 (QuartzNet,
# Citrinet).
RANGES = {
    "novograd": (1e-4, 0.2, 1.0), "sgd": (1e-5, 1.0, 10.0), "lion": (3e-6, 3e-3, 0.02), "adafactor": (1e-5, 0.1, 1.0),
    "adadelta": (1e-2, 2.0, 20.0), "adagrad": (1e-4, 0.1, 1.0),  # torch's own defaults are 1 and 0.01
}
ADAM_LIKE = (2e-5, 1e-2, 0.05)
FROM_SCRATCH = 20  # by which rates from scratch lie below the highest of their optimizer, at the most: 5e-4 for AdamW
USUAL_EPOCHS = 100  # where nothing says how many a run will have
EPOCH_SCHEDULERS = {"ExponentialLR", "ReduceLROnPlateau"}  # NeMo 3.0.0 steps these once an epoch


@dataclass
class Plan:
    """What a run will do, as far as the configuration and the manifests tell; None for what they do not."""

    name: str = ""  # of the schedule
    lr: float | None = None  # as written
    peak: float | None = None  # absolute
    min_lr: float = 0.0
    steps: int | None = None
    schedule_steps: int | None = None
    warmup: int | None = None
    hold: int = 0  # steps at the peak, and the power of the fall after them, of NoamHoldAnnealing
    decay_rate: float = 0.5
    steps_a_pass: float | None = None
    utterances: float | None = None  # in one optimizer step, over devices and accumulation
    seconds: float | None = None
    unresolved: str = ""  # why there is a learning rate and no peak
    evidence: dict = field(default_factory=dict)

    @property
    def noam(self) -> bool:
        """Whether lr is Noam's multiplier. NoamHoldAnnealing is given its peak as it is."""
        return self.name.lower() == "noamannealing"

    def rate(self, step: int) -> float:
        """Learning rate at a step, for the plot and for what is left of the run."""
        warmup, end = self.warmup or 0, self.schedule_steps or self.steps or 1
        if self.noam:
            t = max(step, 1)
            scale = min(t**-0.5, t * warmup**-1.5) / warmup**-0.5 if warmup else t**-0.5
            return max(self.peak * scale, self.min_lr if t > warmup else 0.0)
        if warmup and step <= warmup:
            return self.peak * (step + 1) / (warmup + 1)
        share = min((step - warmup) / max(end - warmup, 1), 1.0)
        name = self.name.lower()
        if name == "noamholdannealing":
            falls = max(step - self.hold, warmup, 1)  # the fall begins where the peak has been held
            return max(self.peak * (max(warmup, 1) / falls) ** self.decay_rate, self.min_lr)
        if name.startswith("cosine"):
            return self.min_lr + (self.peak - self.min_lr) * 0.5 * (1 + math.cos(math.pi * share))
        if name.startswith(("square", "polynomial", "warmupannealing", "warmupholdanneal")):
            return self.min_lr + (self.peak - self.min_lr) * (1 - share)
        return self.peak


def plan(subject) -> Plan:
    """The Plan of the subject's configuration; made once. Raises NotExamined where it says nothing of training."""
    if hasattr(subject, "_plan"):
        return subject._plan
    s = subject.settings
    if not isinstance(s.get("model.optim"), DictConfig) and s.get("trainer") is None:
        raise NotExamined("the configuration has neither model.optim nor trainer")
    p = Plan(name=str(s.get("model.optim.sched.name", "") or ""), lr=s.number("model.optim.lr"))
    if p.lr is None:
        p.lr = s.number("model.optim.args.lr")
    p.min_lr = s.number("model.optim.sched.min_lr", 0.0)
    devices, accumulate = devices_of(s), int(s.number("trainer.accumulate_grad_batches", 1) or 1)
    rows = subject.rows.get("train", []) if subject.has("manifests") else []
    low, high = s.number("model.train_ds.min_duration", 0.0), s.number("model.train_ds.max_duration", math.inf)
    rows = [row for row in rows if low <= row["duration"] <= high]
    seconds = sum(row["duration"] for row in rows)
    mean = seconds / len(rows) if rows else None
    _batch(s, p, devices, accumulate, mean)
    if rows:
        # The last, smaller batch of a pass is a step too.
        p.steps_a_pass = len(rows) / p.utterances if p.utterances and not p.seconds_first else (
            seconds / p.seconds if p.seconds else None)
    _steps(s, p)
    _warmup(s, p)
    if p.lr is not None:
        p.peak = p.lr
        if p.noam and p.lr > 0:
            width = s.number("model.optim.sched.d_model") or s.number("model.encoder.d_model")
            p.peak = None
            if not width or p.warmup is None:
                p.unresolved = ("lr is the multiplier of NoamAnnealing, whose peak hangs on "
                                + ("d_model" if not width else "warmup_ratio of a number of steps")
                                + " that is not known")
            else:
                p.peak = p.lr * width**-0.5 * max(p.warmup, 1) ** -0.5
                p.evidence["Noam"] = f"lr {p.lr:g} / sqrt(d_model {width:g}) / sqrt(warm-up {max(p.warmup, 1)})"
    p.evidence.update({"peak learning rate": p.peak, "as written": p.lr, "schedule": p.name or "none, constant",
                       "optimizer": s.get("model.optim.name", "-"), "steps": p.steps, "warm-up steps": p.warmup})
    subject._plan = p
    return p


@check("schedule", faults=(), needs=("config",))
def whole(subject):
    """The configuration is whole."""
    from tools.doctor.opening import not_composed

    if why := not_composed(subject.settings):
        raise NotExamined(why)


def devices_of(s) -> int:
    """Devices over all nodes; 1 where the number is not written down (auto, -1)."""
    devices = s.get("trainer.devices", 1)
    if isinstance(devices, (list, ListConfig)):
        count = len(devices)
    else:
        count = int(devices) if str(devices).isdigit() and int(devices) > 0 else 1
    return count * int(s.number("trainer.num_nodes", 1) or 1)


def _batch(s, p: Plan, devices: int, accumulate: int, mean: float | None) -> None:
    """Effective batch in utterances and in seconds; `seconds_first` where it is given in seconds."""
    p.seconds_first = True
    if s.recipe and (seconds := s.number("training.global_batch_seconds")):
        p.seconds = seconds
    elif (seconds := s.number("model.train_ds.batch_duration")):
        p.seconds = seconds * devices * accumulate
    elif (size := s.number("model.train_ds.batch_size")):
        p.seconds_first = False
        p.utterances = size * devices * accumulate
    if mean:
        p.utterances = p.utterances or (p.seconds / mean if p.seconds else None)
        p.seconds = p.seconds or (p.utterances * mean if p.utterances else None)
    p.devices, p.accumulate = devices, accumulate


def _steps(s, p: Plan) -> None:
    steps, epochs = s.number("trainer.max_steps", -1), s.number("trainer.max_epochs", -1)
    if steps and steps > 0:
        p.steps = int(steps)
    elif p.steps_a_pass:
        passes = s.number("training.epochs") if s.recipe else epochs
        if passes and passes > 0:
            p.steps = max(int(max(p.steps_a_pass, 1) * passes), 1)
    own = s.number("model.optim.sched.max_steps")
    # NeMo puts the trainer's max_steps in place of the schedule's own where the trainer has one.
    p.schedule_steps = int(own) if own and own > 0 and not (steps and steps > 0) else p.steps
    p.own_steps = int(own) if own and own > 0 else None


def _warmup(s, p: Plan) -> None:
    steps, ratio = s.number("model.optim.sched.warmup_steps"), s.number("model.optim.sched.warmup_ratio")
    if steps is None and s.recipe:
        ratio = s.number("training.warmup_share")
    if steps is not None:
        p.warmup = int(steps)
    elif ratio is not None and p.schedule_steps:
        p.warmup = int(ratio * p.schedule_steps)
    elif ratio is None:
        p.warmup = 0
    hold, share = s.number("model.optim.sched.hold_steps"), s.number("model.optim.sched.hold_ratio")
    p.hold = int(hold if hold is not None else (share or 0) * (p.schedule_steps or 0))
    p.decay_rate = s.number("model.optim.sched.decay_rate", 0.5)


def lr_plot(p: Plan) -> list[Plot]:
    """The learning rate over the run."""
    if not p.peak or not p.steps:
        return []
    steps = [i * p.steps // 200 for i in range(201)]
    return [Plot("Learning rate", "step", "learning rate", {"planned": (steps, [p.rate(i) for i in steps])})]


def lr_range(s) -> tuple[float, float, float]:
    name = str(s.get("model.optim.name", "adamw") or s.get("model.optim._target_", "adamw")).lower()
    return next((limits for key, limits in RANGES.items() if key in name), ADAM_LIKE)


@check("schedule", faults=("lr-zero", "lr-too-low", "lr-too-high"), needs=("config",))
def peak_rate(subject):
    """The peak learning rate is one that trains."""
    s, p = subject.settings, plan(subject)
    if p.peak is None:
        raise NotExamined(p.unresolved or "no learning rate is given")
    low, high, far = lr_range(s)
    key = s.key("model.optim.lr")
    noam = p.noam
    unit = (lambda lr: f"{lr * p.lr / p.peak:.3g}") if noam and p.peak > 0 else (lambda lr: f"{lr:g}")
    started = s.get("init_from") or s.get("init_from_nemo_model") or s.get("init_from_pretrained_model")
    common = dict(evidence={**p.evidence, "usual": f"{low:g} to {high:g}"}, where=key, plots=lr_plot(p))
    if p.peak <= 0:
        yield Finding("lr-zero", "prevents", f"The learning rate is {p.lr:g}.", "Nothing moves.", confidence=1.0,
                      fix=[f"{key}={unit(1e-3) if p.peak > 0 else '1e-3'}"], **common)
    elif p.peak > high and noam and not p.warmup and 0.05 * p.peak < high:
        return  # Noam's schedule without a warm-up starts at its highest: warm_up says so
    elif p.peak > high:
        yield Finding(
            "lr-too-high", "prevents" if p.peak >= far else "warning",
            f"The learning rate peaks at {p.peak:.3g}" + (f" (the multiplier {p.lr:g} resolved)" if noam else "")
            + f"; with this optimizer recipes that train stay under {high:g}.",
            "Steps overshoot: the loss jumps, goes to infinity or stays where letters are as frequent as they are. "
            + ("A multiplier of Noam's schedule was given to another schedule." if p.lr >= 0.5 and not noam else
               "With a short warm-up Noam's multiplier means a high rate." if noam else ""),
            confidence=0.95 if p.peak >= far else 0.7,
            fix=[f"{key}={unit(min(high / 5, 2e-3) if high <= 0.01 else high / 10)}"], **common)
    elif p.min_lr > p.peak:
        yield Finding(
            "lr-too-low", "prevents",
            f"The schedule's floor, min_lr={p.min_lr:g}, is above the rate, which peaks at {p.peak:.3g}.",
            "NeMo's schedules refuse that with an error once the warm-up is over; others jump up to the floor.",
            confidence=0.95, fix=[f"{s.key('model.optim.sched.min_lr')}={p.peak / 100:.2g}, or the rate that was meant "
                                  f"as {key}"], **common)
    elif p.peak < low and not started:
        yield Finding(
            "lr-too-low", "prevents" if p.peak < low / 10 else "warning",
            f"The learning rate peaks at {p.peak:.3g}" + (f" (the multiplier {p.lr:g} resolved)" if noam else "")
            + f"; from scratch, recipes that train use {low:g} or more.",
            "The model stays on its start-up plateau of blanks for longer than the run. "
            + ("Noam's schedule divides by the roots of d_model and warm-up: an absolute rate was given for its "
               "multiplier." if noam else ""),
            confidence=0.95 if p.peak < low / 10 else 0.7, fix=[f"{key}={unit(1e-3)}"], **common)
    elif p.steps and p.schedule_steps and p.schedule_steps < 0.5 * p.steps:
        yield Finding(
            "lr-too-low", "prevents" if p.schedule_steps < 0.1 * p.steps else "warning",
            f"The schedule ends at step {p.schedule_steps}, the run at {p.steps}: for "
            f"{1 - p.schedule_steps / p.steps:.0%} of the run the rate is {p.rate(p.steps):.2g}.",
            "The schedule's own max_steps is not the run's (epochs were given for steps, or a value was left from "
            "another "
            "run).", confidence=0.9, fix=[f"{s.key('model.optim.sched.max_steps')}={p.steps}, or leave it "
                                          "out"], **common)
    if started and high / FROM_SCRATCH < p.peak <= high:
        yield Finding(
            "lr-too-high", "warning",
            f"The run starts from trained weights, and its learning rate peaks at {p.peak:.3g}"
            + (f" (the multiplier {p.lr:g} resolved)" if noam else "") + ", as one from scratch.",
            "Steps of that size carry the weights away from what they have learned: the error rate rises at first, and may not "
            "come back with little data.", confidence=0.6,
            fix=[f"{key}={unit(p.peak / 10)}, and a warm-up", "it may be meant where all but a new decoder is frozen"],
            **common)


@check("schedule", faults=("warmup-too-long", "warmup-missing"), needs=("config",))
def warm_up(subject):
    """The warm-up is there and ends well before the run does."""
    s, p = subject.settings, plan(subject)
    if p.lr is None or p.warmup is None:
        raise NotExamined(p.unresolved or "no learning rate or no length of the warm-up is known")
    key = s.key("model.optim.sched.warmup_steps")
    fix = [f"training.warmup_share=0.1" if s.recipe else f"{key}={max((p.steps or 10000) // 10, 1)}"]
    if p.warmup > 0 and p.steps and p.warmup >= 0.5 * p.steps:
        reached = min(p.steps / p.warmup, 1.0)
        got = f"{reached * p.peak:.2g} of {p.peak:.2g}" if p.peak is not None else f"{reached:.0%} of its peak"
        yield Finding(
            "warmup-too-long", "prevents" if p.warmup >= 2 * p.steps else "warning",
            f"The warm-up takes {p.warmup} of the run's {p.steps} steps: the learning rate gets to {got}.",
            "The rate rises for most of the run, or never arrives: the value comes from a longer run.", p.evidence, fix,
            0.95 if p.warmup >= p.steps else 0.8, where=key, plots=lr_plot(p))
    elif p.warmup <= 0 and p.peak is None:
        raise NotExamined(p.unresolved)
    elif p.warmup <= 0 and p.peak > 3e-4:
        attention = any(word in str(s.get("model.encoder._target_", "")).lower() for word in ("former", "attention"))
        # NovoGrad's rate is of a layer's whole step, Adam's of each weight's: NeMo's QuartzNet starts at 0.01.
        layers = "novograd" in str(s.get("model.optim.name", "")).lower()
        worrying, stopping = (0.05, 0.2) if layers else (2e-3, 0.05)
        yield Finding(
            "warmup-missing",
            "prevents" if p.peak > stopping else "warning" if attention or p.peak > worrying else "note",
            f"There is no warm-up: the first step is made at {p.peak:.2g}.",
            ("NovoGrad's" if layers else "Adam's") + " first steps are as large as its rate, whatever the gradient. "
            "Attention in particular collapses in them and does not come back.", p.evidence, fix,
            0.85 if attention else 0.6, where=key, plots=lr_plot(p))


@check("schedule", faults=("schedule-per-epoch",), needs=("config",))
def schedule_steps(subject):
    """The schedule is stepped once an optimizer step."""
    s, p = subject.settings, plan(subject)
    cause = ("A schedule that is made for steps and stepped once an epoch hardly moves: the warm-up lasts as many "
             "epochs "
             "as it has steps, and the rate stays near 0.")
    fix = ["return {'optimizer': optimizer, 'lr_scheduler': {'scheduler': scheduler, 'interval': 'step'}} from "
           "configure_optimizers"]
    interval = s.get("model.optim.sched.interval")
    if (own := _live_schedule(subject)) is not None:
        scheduler, live, frequency = own
        if live != "epoch":
            return
        from tools.doctor.live import SHORT, stays_low

        limit = s.number("trainer.max_epochs", -1)
        epochs = int(limit) if limit > 0 else USUAL_EPOCHS
        if (seen := stays_low(scheduler, epochs // max(frequency, 1), None)) is None:
            return
        by_epoch, by_step, half = seen
        yield Finding(
            "schedule-per-epoch", "prevents" if half > SHORT else "warning",
            f"The model's own schedule, {type(scheduler).__name__}, is stepped once an epoch: in {epochs} epochs its "
            f"rate gets to {by_epoch:.2g}, stepped at every step it would reach {by_step:.2g}.", cause,
            {"interval": live, "epochs": epochs, "highest rate by epochs": by_epoch, "by steps": by_step,
             "half of its height at": half}, fix, 0.95 if half > SHORT else 0.6,
            where="configure_optimizers")
    elif interval == "epoch":
        yield Finding(
            "schedule-per-epoch", "prevents" if (p.warmup or 0) > 20 else "warning",
            "The learning-rate schedule is stepped once an epoch"
            + (f", its warm-up is {p.warmup} steps." if p.warmup else "."), cause,
            {**p.evidence, "interval": interval}, fix, 0.95, where=s.key("model.optim.sched.interval"))
    elif p.name in EPOCH_SCHEDULERS and p.steps_a_pass and p.steps and p.steps < 3 * p.steps_a_pass:
        yield Finding(
            "schedule-per-epoch", "warning", f"{p.name} is stepped once an epoch, and the run has "
            f"{p.steps / p.steps_a_pass:.1f} of them.", cause, p.evidence,
            ["model.optim.sched.name=CosineAnnealing, which is stepped every step"], 0.8,
            where=s.key("model.optim.sched.name"))


def _live_schedule(subject) -> tuple | None:
    """(schedule, "step" or "epoch", how many of them to a step of it) of a live model's own configure_optimizers; None
    for NeMo's, and where there is none."""
    if not subject.has("model"):
        return None
    from nemo.core.classes import ModelPT

    from tools.doctor.probe import untouched

    model = subject.model
    if type(model).configure_optimizers is ModelPT.configure_optimizers:
        return None
    trainer = getattr(model, "_trainer", None)
    found = getattr(trainer, "lr_scheduler_configs", None) or []
    if found:
        return found[0].scheduler, found[0].interval, found[0].frequency
    try:
        with untouched(model):
            made = model.configure_optimizers()
    except Exception:  # anybody's code, without a trainer
        return None
    schedule = made.get("lr_scheduler") if isinstance(made, dict) else None
    if isinstance(made, tuple) and len(made) == 2:
        schedule = made[1]
    schedule = schedule[0] if isinstance(schedule, (list, tuple)) and schedule else schedule
    if isinstance(schedule, dict):
        return schedule.get("scheduler"), schedule.get("interval", "epoch"), int(schedule.get("frequency", 1))
    return (schedule, "epoch", 1) if schedule is not None else None  # Lightning's default


@check("schedule", faults=("batch-size",), needs=("config",))
def effective_batch(subject):
    """The effective batch is near the recipe's."""
    s, p = subject.settings, plan(subject)
    if p.utterances is None and p.seconds is None:
        raise NotExamined("no size of the batch is given")
    key = "training.global_batch_seconds" if s.recipe else s.key("model.train_ds.batch_size")
    evidence = {"utterances a step": p.utterances, "seconds of audio a step": p.seconds, "devices": p.devices,
                "accumulated batches": p.accumulate, "steps a pass over the data": p.steps_a_pass}
    usual = _recipe_batch(s) if s.recipe else None
    if usual:
        evidence["the recipe's seconds"] = usual
        if not 0.25 <= p.seconds / usual <= 4:
            yield Finding(
                "batch-size", "warning",
                f"A step sees {p.seconds:g} s of audio, the recipe's {usual:g} s were tuned with its learning rate.",
                "With a batch many times smaller gradients are noise at this rate; with one many times larger there "
                "are too "
                "few steps.", evidence, [f"{key}={usual:g}, or scale the learning rate with the square root of the "
                                         "batch"],
                0.8, where=key)
            return
    if (p.utterances is not None and p.utterances < 4) or (p.utterances is None and p.seconds < 8):
        yield Finding(
            "batch-size", "warning",
            f"A step sees {p.utterances:.1f} utterances over all devices and accumulated batches."
            if p.utterances is not None else f"A step sees {p.seconds:g} s of audio.",
            "The gradient of so few utterances is mostly noise: from scratch the model stays with blanks, and batch "
            "normalisation has next to no statistics.", evidence,
            ["trainer.accumulate_grad_batches=8, or a larger model.train_ds.batch_size"], 0.8, where=key)
    elif p.steps_a_pass is not None and p.steps_a_pass < 1:
        yield Finding(
            "batch-size", "warning",
            f"A step sees {p.utterances:.0f} utterances, more than the whole corpus has: {p.steps_a_pass:.2g} steps a pass over the data.",
            "Devices, accumulated batches and the batch of each multiply. A step adds up the gradients of the same utterances "
            "several times over, and costs as many passes.", evidence,
            ["a smaller model.train_ds.batch_size", "trainer.accumulate_grad_batches=1"], 0.8, where=key)
    elif (p.steps_a_pass is not None and p.steps_a_pass < 8 and p.steps is not None and p.steps < 600
          and not _has_learned(subject)):
        yield Finding(
            "batch-size", "warning",
            f"The batch of {p.utterances:.0f} utterances makes {p.steps_a_pass:.1f} steps of a pass over the data, "
            f"{p.steps} in the whole run.",
            "CTC from scratch needs hundreds to thousands of steps to leave its plateau of blanks; a large batch on a "
            "small "
            "corpus has too few.", evidence, ["a smaller batch, or more epochs"], 0.7, where=key)


def _has_learned(subject) -> bool:
    """Whether it is of a run whose loss has left its plateau: then there were steps enough for that."""
    from tools.doctor.explain import trace_of
    from tools.doctor.trace import shape

    curve = shape(trace_of(subject)) if subject.has("run") else None
    return curve is not None and bool(curve.learned)


def _recipe_batch(s) -> float | None:
    """Seconds of the global batch in the corpus's own YAML."""
    from recipes.config import CONF

    path = CONF / "corpus" / f"{s.get('corpus.name', '')}.yaml"
    if not path.is_file():
        return None
    import yaml

    value = yaml.safe_load(path.read_text()).get("global_batch_seconds")
    return float(value) if value else None
