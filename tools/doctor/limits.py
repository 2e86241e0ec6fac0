"""What goes with a schedule: clipping, dropout, weight decay, precision. From the configuration; no torch."""

from __future__ import annotations

import math

from omegaconf import DictConfig, ListConfig
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from tools.doctor.finding import Finding
from tools.doctor.registry import NotExamined, check
from tools.doctor.schedule import plan
from tools.doctor.trained import started_from

NUMBERS = (
    "trainer.max_steps", "trainer.max_epochs", "trainer.gradient_clip_val", "trainer.accumulate_grad_batches",
    "trainer.num_nodes", "model.optim.lr", "model.optim.weight_decay", "model.optim.sched.warmup_steps",
    "model.optim.sched.warmup_ratio", "model.optim.sched.max_steps", "model.optim.sched.min_lr", "model.sample_rate",
    "model.preprocessor.sample_rate", "model.train_ds.batch_size", "model.train_ds.batch_duration",
    "model.train_ds.max_duration", "model.train_ds.min_duration", "training.epochs", "training.global_batch_seconds",
)
OF_THE_START = 0.05  # share of an average that may be of the weights at the start, at the end of a run
KEPT = 0.5  # share of the hours, below which the limits of duration are said


@check("limits", faults=("model-does-not-build",), needs=("config",))
def values(subject):
    """Numbers are numbers, and what refers to another key finds it."""
    s = subject.settings
    wrong = {key: value for key in NUMBERS if (value := s.get(key)) is not None and s.number(key) is None}
    lost = dict(_lost(s.cfg))
    elsewhere = {}
    if not s.prefix or subject.given_config is None and subject.run is None:
        # Of a section alone, or a live model's, what it refers to may be in the rest.
        lost, elsewhere = {}, lost
    for key, value in {**wrong, **lost}.items():
        yield Finding(
            "model-does-not-build", "prevents",
            f"{s.key(key)} is {str(value)!r}, " + ("which is no number." if key in wrong else
                                                  "and the key that it refers to is not there."),
            "Training ends with an error as soon as the value is read.", {"value": str(value)},
            [f"mend the value of {s.key(key)}"], 1.0, where=s.key(key))
    if elsewhere:
        raise NotExamined("without the whole configuration nothing says what these are: " + ", ".join(
            f"{s.key(key)}={value}" for key, value in list(elsewhere.items())[:5]))


@check("limits", faults=("data-filtered",), needs=("config", "manifests"))
def durations_kept(subject):
    """The limits of duration leave most of the data."""
    s = subject.settings
    for role, section in (("train", "train_ds"), ("validation", "validation_ds")):
        rows = subject.rows.get(role, [])
        keys = {name: f"model.{section}.{name}" for name in ("min_duration", "max_duration")}
        low, high = s.number(keys["min_duration"], 0.0), s.number(keys["max_duration"], math.inf)
        durations = [row["duration"] for row in rows]
        left = [seconds for seconds in durations if low <= seconds <= high]
        share = sum(left) / max(sum(durations), 1e-9)
        if not durations or share >= KEPT:
            continue
        short, long = sum(d < low for d in durations), sum(d > high for d in durations)
        ordered = sorted(durations)
        if long >= short:
            name, limit, within = "max_duration", high, ", which 99 % of them are within"
            enough = ordered[min(int(0.99 * len(ordered)), len(ordered) - 1)]
        else:
            name, limit, within, enough = "min_duration", low, "", ordered[0]
        key = s.key(keys[name])
        yield Finding(
            "data-filtered", "prevents" if role == "train" and not left else "warning",
            f"{key}={limit:g} leaves {len(left)} of {len(durations)} utterances of {role}, "
            f"{sum(left) / 3600:.2f} of {sum(durations) / 3600:.2f} h.",
            "Loaders drop what is shorter or longer without a word: the model learns from the rest alone, and never "
            "hears speech of the lengths that it is tested on.",
            {"longer": long, "shorter": short, "of": len(durations), "share of the hours left": round(share, 3),
             "median, s": ordered[len(ordered) // 2], "longest, s": ordered[-1]},
            [f"{key}={enough:.2f}{within}"], 0.9, where=key)


def _lost(node, prefix: str = ""):
    """(dotted key, reference) of what refers to a key that is not there, in what a training reads."""
    for key in node:
        path = f"{prefix}.{key}" if prefix else str(key)
        if path.startswith(("hydra", "exp_manager", "model.test_ds")):
            continue
        try:
            value = node[key]
        except InterpolationKeyError:
            yield path, node._get_node(key)._value()
        except OmegaConfBaseException:
            continue  # a value that is missing, a resolver of somebody's own
        else:
            if isinstance(value, DictConfig):
                yield from _lost(value, path)


@check("limits", faults=("clip-missing", "clip-too-low"), needs=("config",))
def clipping(subject):
    """Gradients are clipped, at a limit that lets them move, by a name that is read."""
    s = subject.settings
    trainer = s.get("trainer")
    stray = {key: value for key, value in _walk(s.cfg) if _looks_like_a_limit(key) and value is not None}
    value = s.number("trainer.gradient_clip_val")
    optimizer = str(s.get("model.optim.name", "adamw")).lower()
    if stray and not value:
        yield Finding(
            "clip-missing", "warning",
            f"A limit for gradients is set as {', '.join(f'{k}={v}' for k, v in stray.items())}, a name that nothing "
            "reads.",
            "Lightning reads trainer.gradient_clip_val alone: gradients are not clipped.", {"read by nothing": stray},
            [f"trainer.gradient_clip_val={next(iter(stray.values()))}"], 0.95, where=next(iter(stray)))
        return
    if trainer is None:
        raise NotExamined("there is no trainer section")
    if not value:
        target = str(s.get("model.encoder._target_", "")).lower()
        recurrent = any(word in target for word in ("rnn", "lstm", "gru", "deepspeech"))
        yield Finding(
            "clip-missing", "warning" if recurrent else "note",
            "Gradients are not clipped (trainer.gradient_clip_val is not set).",
            "CTC gives a few utterances gradients a hundred times the usual; recurrent networks throw what they have "
            "learned "
            "away in one such step.", {"trainer.gradient_clip_val": value},
            ["trainer.gradient_clip_val=1.0"], 0.7 if recurrent else 0.4, where="trainer.gradient_clip_val")
    elif value < 0:
        yield Finding("clip-missing", "warning", f"trainer.gradient_clip_val={value:g} clips nothing.",
                      "A negative limit turns gradients round or is ignored.", {"value": value},
                      ["trainer.gradient_clip_val=1.0"], 0.9, where="trainer.gradient_clip_val")
    elif value < 0.02:
        plain = optimizer in ("sgd",)
        yield Finding(
            "clip-too-low", "prevents" if value < 1e-4 or plain else "warning",
            f"Gradients are clipped to a norm of {value:g}; CTC models have norms of 1 to 100 while they train.",
            "Every step is cut to next to nothing. With plain SGD nothing moves at all; Adam divides the scale out "
            "again, "
            "until its epsilon is larger than what is left.", {"limit": value, "optimizer": optimizer},
            ["trainer.gradient_clip_val=1.0"], 0.9, where="trainer.gradient_clip_val")


def _looks_like_a_limit(key: str) -> bool:
    name = key.rpartition(".")[2].lower()
    if key in ("trainer.gradient_clip_val", "trainer.gradient_clip_algorithm"):
        return False
    if "clip" in name and "grad" in key.lower():
        return True
    return name in ("clip", "max_norm", "max_grad_norm", "clip_norm") and not key.startswith(
        ("model.encoder", "model.decoder"))


def _walk(node, prefix: str = ""):
    """(dotted key, value) of all that is not a section."""
    for key in node:
        path = f"{prefix}.{key}" if prefix else str(key)
        try:
            value = node[key]
        except Exception:  # missing or unresolved
            continue
        if isinstance(value, DictConfig):
            yield from _walk(value, path)
        elif isinstance(value, ListConfig):
            for i, item in enumerate(value):
                if isinstance(item, DictConfig):
                    yield from _walk(item, f"{path}[{i}]")
        else:
            yield path, value


@check("limits", faults=("dropout-range", "weight-decay-range"), needs=("config",))
def regularisation(subject):
    """Dropout and weight decay are within reason."""
    s, p = subject.settings, None
    rates = {key: float(value) for key, value in _walk(s.cfg) if key.startswith("model.")
             and ("dropout" in key.rpartition(".")[2] or key.endswith("drop_prob"))
             and isinstance(value, (int, float)) and not isinstance(value, bool)}
    high = {key: value for key, value in rates.items() if value > 0.5 or value < 0}
    if high:
        worst = max(high, key=lambda key: abs(high[key]))
        yield Finding(
            "dropout-range", "prevents" if abs(high[worst]) >= 0.8 or high[worst] < 0 else "warning",
            f"{s.key(worst)} is {high[worst]:g}; recipes that train use 0 to 0.3.",
            "Most of every layer's output is set to 0 in training: a fresh model gets no usable signal through several "
            "such "
            "layers and stays with blanks.", {s.key(key): value for key, value in high.items()},
            [f"{s.key(worst)}=0.1"], 0.9, where=s.key(worst))
    decay = s.number("model.optim.weight_decay")
    if decay is None:
        return
    name = str(s.get("model.optim.name", "adamw")).lower()
    try:
        p = plan(subject)
    except NotExamined:
        p = None
    coupled = name in ("adam", "sgd", "adamax", "radam", "rmsprop", "adagrad")
    limit = 0.01 if coupled else 0.2
    # What decay alone leaves of a weight by the end of the run.
    left = None
    if p is not None and p.peak and p.steps and not coupled:
        left = math.exp(-decay * 0.5 * p.peak * p.steps)
    if decay < 0 or decay > limit:
        yield Finding(
            "weight-decay-range",
            "prevents" if decay < 0 or decay > 5 * limit or (left is not None and left < 0.05) else "warning",
            f"{s.key('model.optim.weight_decay')} is {decay:g}; with {name}, recipes that train use "
            f"{'0 to 0.001' if coupled else '0 to 0.1'}.",
            "Weights are drawn to 0 faster than gradients can build them up." if decay > 0 else
            "A negative decay lets weights grow without limit.",
            {"weight decay": decay, "optimizer": name, "left of a weight by decay alone": left},
            [f"{s.key('model.optim.weight_decay')}={'1e-4' if coupled else '1e-2'}"], 0.85,
            where=s.key("model.optim.weight_decay"))


@check("limits", faults=("dropout-range",), needs=("model",))
def dropout_of_modules(subject):
    """Dropout modules of the live model are within reason."""
    from torch import nn

    rates = {name: float(m.p) for name, m in subject.model.named_modules()
             if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0.5}
    if rates:
        worst = max(rates, key=rates.get)
        yield Finding(
            "dropout-range", "prevents" if rates[worst] >= 0.8 else "warning",
            f"{len(rates)} dropout modules set more than half of what passes to 0, {worst} {rates[worst]:.0%}.",
            "A fresh model gets no usable signal through several such layers and stays with blanks.",
            {"rates": dict(list(rates.items())[:8])}, ["0 to 0.3 (the argument is the share that is dropped)"], 0.85,
            where=worst)


@check("limits", faults=("precision-overflow",), needs=("config",))
def precision(subject):
    """Numbers are wide enough."""
    s = subject.settings
    value = str(s.get("trainer.precision", "32"))
    cpu = s.get("trainer.accelerator") == "cpu"
    half = value in ("16", "16-true", "16-mixed", "half")
    if not half and value != "bf16-true":
        return
    true = value.endswith("true")
    yield Finding(
        "precision-overflow", "prevents" if value == "16-true" or half and cpu else "warning",
        f"trainer.precision={value}" + (" on a CPU." if cpu else "."),
        ("float16 holds numbers up to 65504 and down to 6e-8: sums over hundreds of frames of CTC, attention scores "
         "and "
         "small gradients fall outside, and the loss is infinite or NaN." if half else
         "bfloat16 keeps 8 bits of a number: with weights in it, most updates are rounded away.")
        + (" Weights and optimizer state are kept in it too." if true else ""),
        {"precision": value, "accelerator": s.get("trainer.accelerator", "-")},
        ["trainer.precision=bf16-mixed, or 32; compute the CTC loss in float32 (log_probs.float())"],
        0.9 if true or cpu else 0.6, where="trainer.precision")


@check("limits", faults=("ema-too-slow",), needs=("config",))
def average_follows(subject):
    """The average of the weights (EMA) that is validated and kept follows the weights within the run."""
    s = subject.settings
    if not s.get("exp_manager.ema.enable"):
        return
    key = s.key("exp_manager.ema")
    decay, every = s.number("exp_manager.ema.decay", 0.999), max(s.number("exp_manager.ema.every_n_steps", 1), 1)
    if (steps := plan(subject).steps) is None:
        raise NotExamined("the number of steps is not known")
    left = max(decay, 0.0) ** (steps / every)
    if left <= OF_THE_START:
        return
    alone, started = bool(s.get("exp_manager.ema.validate_original_weights")), started_from(s)
    fits = max(1 - every * 10 / steps, 0.0)  # a tenth of the run, and 5e-5 of the start at its end
    yield Finding(
        "ema-too-slow", "prevents" if left > 0.5 and not alone and not started else "warning",
        f"{key}.decay={decay:g}{f', every {every:g} steps' * (every > 1)}: after the {steps} steps of the run the average "
        f"is still made of {left:.0%} of the weights that the model began with.",
        "NeMo's average begins at the first step's weights and has no warm-up. " + (
            "The checkpoints that are kept of it (-EMA) are those of a model that has hardly been trained."
            if alone or started else
            "Validation and the -EMA checkpoints are of the average: val_wer stays near 1 while the train loss falls."),
        {"decay": decay, "every n steps": every, "steps": steps, "share of the first weights": round(left, 4)},
        [f"{key}.decay={fits:.6g}", f"{key}.enable=false"], 0.95, where=f"{key}.decay")


@check("limits", faults=("optimizer-betas",), needs=("config",))
def betas(subject):
    """Adam's averages are of lengths with which its steps are bounded."""
    s = subject.settings
    name = str(s.get("model.optim.name", "") or "").lower()
    given = s.get("model.optim.betas")
    if name not in ("adam", "adamw", "nadam", "radam", "adamax"):
        raise NotExamined(f"the optimizer is {name or 'not named'}, not of Adam's family")
    if given is None:
        return
    try:
        first, second = (float(value) for value in given)
    except (TypeError, ValueError):
        raise NotExamined(f"model.optim.betas is {given}") from None
    inside = 0 <= first < 1 and 0 <= second < 1
    if inside and first**2 < second**0.5:
        return
    key = s.key("model.optim.betas")
    turned = first > second
    yield Finding(
        "optimizer-betas",
        "warning" if inside else "prevents",
        f"{key} is [{first:g}, {second:g}]: gradients are averaged over {1 / max(1 - first, 1e-9):.0f} steps and their "
        f"squares over {1 / max(1 - second, 1e-9):.0f}." if inside else
        f"{key} is [{first:g}, {second:g}]; both must be from 0 to less than 1.",
        "Adam divides the one average by the root of the other, and needs beta1^2 < sqrt(beta2) (Kingma & Ba 2015, "
        "theorem 4.1): a few small gradients empty the short average of squares while the long one of gradients is "
        "still full, and the step between them has no bound."
        + (" They stand the wrong way round." if turned else "") if inside else
        "torch refuses them, or nothing is ever averaged.",
        {"beta1": first, "beta2": second, "beta1^2 / sqrt(beta2)": round(first**2 / max(second, 1e-12) ** 0.5, 4)},
        [f"{key}=[{second:g},{first:g}]" if turned and second**2 < first**0.5 else f"{key}=[0.9,0.98]"],
        0.85,
        where=key,
    )
