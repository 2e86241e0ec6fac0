"""Can the optimizer and its schedule be made? NeMo makes them when training begins, after the model and the data."""

from __future__ import annotations

import difflib
import re
from types import SimpleNamespace

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tools.doctor.engine import first_line
from tools.doctor.finding import Finding
from tools.doctor.registry import NotExamined, check
from tools.doctor.schedule import plan

# What NeMo knows only where CUDA, Apex or Megatron are.
HARDWARE = re.compile("cuda|apex|fused_adam|nccl|mcore|muon|flashoptim|no module named", re.IGNORECASE)


@check("optimizer", faults=("model-does-not-build",), needs=("config", "model"))
def can_be_made(subject):
    """The optimizer and the schedule of the configuration can be made."""
    from nemo.core.classes import ModelPT

    s = subject.settings
    optim, sched = optimizer_settings(subject)
    parts = [("optimizer", s.key("model.optim"), optim.get("_target_") or optim.get("name", "adam"), optim)]
    if sched:
        parts.append(("schedule", s.key("model.optim.sched"), sched.get("name"), {**optim, "sched": sched}))
    for what, key, name, settings in parts:
        error = _error(ModelPT, settings)
        if error is None:
            continue
        said = first_line(error).partition(" Available ")[0]
        if HARDWARE.search(f"{name} {said}"):
            raise NotExamined(f"{key} needs what is not here: {said}")
        yield Finding(
            "model-does-not-build", "prevents", f"The {what} {name} cannot be made: {said}",
            "It is made when training begins, and ends it there.",
            {"error": f"{type(error).__name__}: {said}"}, [_change(key, what, name, error)], 0.95,
            where=key)
        return  # without the optimizer there is no schedule


def optimizer_settings(subject) -> tuple[dict, dict]:
    """model.optim and its sched as plain dicts; what training fills in is filled in.

    Raises NotExamined where the optimizer is not made of them.
    """
    from nemo.core.classes import ModelPT

    if type(subject.model).configure_optimizers is not ModelPT.configure_optimizers:
        raise NotExamined("the model has a configure_optimizers of its own")
    if not isinstance(subject.settings.get("model.optim"), DictConfig):
        raise NotExamined("the configuration has no model.optim")
    try:
        optim = OmegaConf.to_container(subject.settings.get("model.optim"), resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise NotExamined(first_line(error)) from None
    sched = dict(optim.pop("sched", None) or {})
    own = plan(subject)
    filled = {"warmup_steps": own.warmup or 0, "min_lr": 0.0, "max_steps": own.schedule_steps or 10000, "lr": 1e-3}
    for settings in (optim, sched):
        for key in [key for key, value in settings.items() if value == "???"]:
            settings[key] = filled.get(key)
    if sched and (sched.get("max_steps") or -1) < 0:
        sched["max_steps"] = max(own.schedule_steps or 10000, (own.warmup or 0) + 1)
    return optim, sched


def made(model_class, optim: dict, parameters: list):
    """The optimizer that NeMo's own setup_optimization makes of these settings for these parameters. Raises whatever
    anybody's optimizer raises."""
    stand_in = SimpleNamespace(
        _cfg=None, _trainer=None, _train_dl=None, _optimizer_param_groups=[{"params": parameters}],
        setup_optimizer_param_groups=lambda: None, _optim_config_copy=lambda config: OmegaConf.create(config))
    model_class.setup_optimization(stand_in, optim)
    return stand_in._optimizer


def _error(model_class, optim: dict) -> Exception | None:
    """What is raised for one parameter that stands for all; None where nothing is."""
    import torch

    try:
        made(model_class, optim, [torch.nn.Parameter(torch.zeros(2, 2))])
    except Exception as error:
        return error
    return None


def _change(key: str, what: str, name: str, error: Exception) -> str:
    """The line to change, with the nearest names that there are where a name is not known."""
    message = str(error)
    if lacks := re.findall(r"missing \d+ required .*?: (.*)", message):
        return "; ".join(f"{key}.{word}=..." for word in re.findall(r"'(\w+)'", lacks[0]))
    if unknown := re.findall(r"unexpected keyword argument '(\w+)'", message):
        return f"remove {key}.{unknown[0]}, or mend its name"
    if message.startswith("Cannot resolve"):
        near = difflib.get_close_matches(str(name), _names(what), n=2, cutoff=0.5) or _names(what)
        return " or ".join(f"{key}.name={known}" for known in near[:8])
    return f"mend {key} as the message says"


def _names(what: str) -> list[str]:
    from nemo.core.optim import lr_scheduler, optimizers

    return sorted(optimizers.AVAILABLE_OPTIMIZERS if what == "optimizer" else lr_scheduler.AVAILABLE_SCHEDULERS)
