"""Do all parameters get a gradient, are they trainable, are they in the optimizer?"""

from __future__ import annotations

import math

import torch

from tools.doctor.finding import Finding
from tools.doctor.loss import call_loss
from tools.doctor.registry import NotExamined, check
from tools.doctor.trained import FROM_TRAINED, judged, started_from
from tools.doctor.training_step import run_training_step

TRIES = range(6, 13)  # seeds of further steps, where some modules were not reached


def backward(probe, seed: int = 5) -> tuple[dict[str, float], str]:
    """Parameter name -> root mean square of its gradient after one training step (-1: none), and whose loss it was.

    Call it inside `ready(train=True)`. Raises NotExamined where there is no finite loss.
    """
    step = run_training_step(probe, seed)
    loss, source = step.loss, "training_step"
    if step.backward:  # what it returns is for the log
        return sizes_of(probe.model), "training_step, backwards by itself"
    if loss is not None and not loss.requires_grad:
        return {name: -1.0 for name, p in probe.model.named_parameters() if p.requires_grad}, source
    # Of targets that do not fit NeMo makes a loss of 0, which says nothing of the model: the lengths do.
    if loss is None or not bool(loss.detach().any()):
        x, lengths = probe.features()
        out, frames = probe.forward(x, lengths)
        targets = torch.ones(len(x), 2, dtype=torch.long, device=x.device)
        targets[:, 1] = 2
        loss, source = call_loss(probe.model, out, targets, frames, torch.full_like(frames, 2)), "forward and loss"
    loss = loss.sum()  # one number, as it ought to be: the loss family says where it is not
    if not bool(torch.isfinite(loss.detach())):
        raise NotExamined(f"the loss of the probe's batch is {float(loss.detach())}")
    loss.backward()
    return sizes_of(probe.model), source


def sizes_of(model) -> dict[str, float]:
    """Trainable parameter -> root mean square of its gradient, -1 where there is none."""
    return {name: -1.0 if p.grad is None else float(p.grad.double().square().mean().sqrt())
            for name, p in model.named_parameters() if p.requires_grad}


def wake(model) -> bool:
    """Takes a small step with weights that are all 0 and have a gradient; whether there were any.

    Adapters, LoRA and gates begin so, on purpose: what lies before them has a gradient of 0 until the first step.
    """
    asleep = [p for name, p in model.named_parameters() if p.requires_grad and p.grad is not None
              and not name.endswith("bias") and not bool(p.any()) and 0 < float(p.grad.abs().max()) < math.inf]
    with torch.no_grad():
        for p in asleep:
            p.sub_(1e-2 * p.grad / p.grad.abs().max())
    for p in model.parameters():
        p.grad = None
    return bool(asleep)


def _try_again(probe, gradients: dict[str, float]) -> list[str]:
    """Puts gradients of further steps into `gradients`, where modules are left out of a step at random (stochastic depth,
    LayerDrop). Returns the parameters of those that no step ran and evaluation runs."""
    owners = {name: probe.model.get_submodule(name.rpartition(".")[0]) for name in gradients}
    missing = [name for name, size in gradients.items() if size <= 0.0]
    resting: list[str] = []
    ran: set[int] = set()
    handles = [module.register_forward_hook(lambda module, *_: ran.add(id(module)))
               for module in {id(owners[name]): owners[name] for name in missing}.values()]
    try:
        for seed in TRIES:
            if not missing:
                break
            ran.clear()
            for p in probe.model.parameters():
                p.grad = None
            later, _ = backward(probe, seed)
            fewer = [name for name in missing if later[name] <= 0.0]
            resting = [name for name in fewer if id(owners[name]) not in ran]
            for name in set(missing) - set(fewer):
                gradients[name] = later[name]
            if not resting and len(fewer) == len(missing):  # they all run, and get none
                return []
            missing = fewer
        if resting:
            ran.clear()
            with probe.ready(), torch.no_grad():
                probe.forward(*probe.features())
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in missing if name in resting and id(owners[name]) in ran]


def _left_out(names: list[str], sizes: dict[str, int]) -> Finding:
    share = sum(sizes[name] for name in names) / sum(sizes.values())
    return Finding(
        "train-eval-differ", "prevents" if share > 0.1 else "warning",
        f"Modules with {share:.0%} of all values ran in none of {len(TRIES) + 1} training steps, and run in evaluation: "
        f"{', '.join(parts(names)[:6])}.",
        "They are left out of training, at random with a probability near 1 (that of keeping a layer taken for that of dropping "
        "it), or always (`if self.training`): they stay as initialised, and evaluation goes through them.",
        {"modules": parts(names)[:20], "share of values": round(share, 4), "steps": len(TRIES) + 1},
        ["stochastic depth: drop with 0.1, keep with 0.9: if torch.rand(1) < drop: return x"], 0.9, where=names[0])


def parts(names: list[str]) -> list[str]:
    """Names of parameters gathered into the modules that they fill, for messages."""
    return list(dict.fromkeys(name.rpartition(".")[0] or name for name in names))


@check("gradients", faults=("no-gradient", "train-eval-differ"), needs=("model",))
def gradients_arrive(subject):
    """Every trainable parameter gets a gradient."""
    probe = subject.probe
    sizes = {name: p.numel() for name, p in probe.model.named_parameters() if p.requires_grad}
    if not sizes:
        raise NotExamined("no parameter is trainable")
    with probe.ready(train=True):
        gradients, source = backward(probe)
        if 0.0 in gradients.values() and wake(probe.model):
            later, _ = backward(probe)
            gradients = {name: size if size != 0.0 else later[name] for name, size in gradients.items()}
        skipped = _try_again(probe, gradients)
    if skipped:
        yield _left_out(skipped, sizes)
    without = [name for name, size in gradients.items() if size <= 0.0 and name not in skipped]
    if not without:
        return
    none = [name for name in without if gradients[name] < 0]
    share = sum(sizes[name] for name in without) / sum(sizes.values())
    whole = len(without) == len(sizes)
    encoder = [name for name in sizes if name.startswith("encoder.")]
    no_encoder = bool(encoder) and all(name in without for name in encoder)
    order = list(sizes)
    after = [name for name in order[order.index(without[-1]) + 1 :] if name not in without]
    if whole:
        cause = "The loss is not connected to the parameters: it was detached, or computed under torch.no_grad()."
    elif len(none) == len(without) and order[: len(without)] == without and after:
        cause = (f"The graph is cut between {parts(without)[-1]} and {parts(after)[0]}: .detach(), .data, .item(), "
                 "torch.no_grad() or numpy stands between them, or torch.utils.checkpoint(use_reentrant=True) around "
                 "what is given features, which need no gradient. All before the cut stays as initialised.")
    elif none:
        cause = "These modules are built but their result is not used, or it is detached."
    else:
        cause = ("Their gradient is exactly 0: what they compute is multiplied by 0, rounded (round, floor, sign, "
                 "argmax and comparisons have a gradient of 0), or the activation behind them is 0 everywhere (dead "
                 "ReLU).")
    yield Finding(
        "no-gradient",
        "prevents" if whole or no_encoder or share > 0.2 else "warning" if share > 0.01 else "note",
        f"{len(without)} of {len(sizes)} trainable parameter tensors ({share:.0%} of all values) get no gradient from "
        "a "
        f"training step: {', '.join(parts(without)[:6])}{' ...' if len(parts(without)) > 6 else ''}.",
        cause,
        {"tensors": len(without), "of": len(sizes), "share of values": round(share, 4), "modules": parts(without)[:20],
         "not reached": len(none), "exactly 0": len(without) - len(none), "loss of": source},
        ["remove the detach or no_grad on the way from there to the loss; if the module is meant to be unused, do not "
         "build it (DDP stops at unused parameters)"] if none else
        ["rounding: a straight-through estimator, x + (x.round() - x).detach()",
         "remove the factor of 0; LeakyReLU or a smaller rate where ReLUs are dead"],
        0.97 if none else 0.85,
        where=without[0] if not after else parts(without)[-1],
    )


@check("gradients", faults=("frozen",), needs=("model",))
def parameters_are_trainable(subject):
    """Parameters are trainable."""
    probe = subject.probe
    frozen = {n: p for n, p in probe.model.named_parameters()
              if not p.requires_grad and not n.startswith("preprocessor.")}
    total = sum(p.numel() for p in probe.model.parameters())
    if not frozen:
        return
    share = sum(p.numel() for p in frozen.values()) / max(total, 1)
    apart = _takes_no_part(probe, set(frozen))
    started = started_from(subject.settings, probe.model, getattr(probe.model, "_trainer", None),
                           [name for name, p in probe.model.named_parameters() if p.requires_grad])
    random, seen = judged(frozen, started)
    random = random and not apart
    yield Finding(
        "frozen",
        "prevents" if share > 0.2 and random else "warning",
        f"{len(frozen)} parameter tensors ({share:.0%} of all values) are frozen (requires_grad=False): "
        f"{', '.join(parts(list(frozen))[:6])}{' ...' if len(parts(list(frozen))) > 6 else ''}.",
        "They take no part in training: a copy, an average of the weights for evaluation. That is right where "
        "something updates it at every step, and else evaluation is by the weights it was made with." if apart else
        f"encoder.freeze(), a leftover of fine-tuning, or export(), which leaves a model so. {seen}",
        {"tensors": len(frozen), "share of values": round(share, 4), "modules": parts(list(frozen))[:20]},
        ["model.encoder.unfreeze(), or for p in model.parameters(): p.requires_grad_(True)"],
        0.95 if random else 0.5,
        where=next(iter(frozen)),
    )


def _takes_no_part(probe, names: set[str]) -> bool:
    """Whether outputs in train mode are the same whatever these parameters are."""
    with probe.ready(train=True), torch.no_grad():
        x, lengths = probe.features()
        before = probe.forward(x, lengths)[0]
        for name, p in probe.model.named_parameters():
            if name in names and p.is_floating_point():
                p.mul_(-2.0).add_(0.1)
        after = probe.forward(x, lengths)[0]
    return before.shape == after.shape and bool(torch.equal(before, after))


def parameter_groups(probe) -> tuple[list[dict], str] | None:
    """(parameter groups, where from) of the optimizer in place, or of the one that the model would make."""
    model = probe.model
    optimizer = getattr(model, "_optimizer", None)
    if optimizer is None and getattr(model, "_trainer", None) is not None:
        optimizers = getattr(model._trainer, "optimizers", None)
        optimizer = optimizers[0] if optimizers else None
    if getattr(optimizer, "param_groups", None):
        return optimizer.param_groups, "the model's optimizer"
    from nemo.core.classes import ModelPT

    own = type(model).configure_optimizers is not getattr(ModelPT, "configure_optimizers", None)
    if own:
        try:
            made = model.configure_optimizers()
        except Exception as error:  # anybody's code, without a trainer
            raise NotExamined(f"configure_optimizers does not run outside a trainer ({type(error).__name__})") from None
        while isinstance(made, (tuple, list)) and made:
            made = made[0]
        made = made.get("optimizer") if isinstance(made, dict) else made
        return (made.param_groups, "configure_optimizers") if hasattr(made, "param_groups") else None
    if hasattr(model, "setup_optimizer_param_groups"):
        try:
            model.setup_optimizer_param_groups()
        except Exception as error:  # anybody's code; ours asks a model's own configuration, which may have no optim
            raise NotExamined(f"its groups of parameters cannot be made ({type(error).__name__}: {error})") from None
        groups = model._optimizer_param_groups
        groups = [g if isinstance(g, dict) else {"params": [g]} for g in groups]
        return [{**g, "params": list(g["params"])} for g in groups], "setup_optimizer_param_groups"
    return None


@check("gradients", faults=("not-in-optimizer", "lr-zero", "lr-too-low"), needs=("model",))
def parameters_are_optimised(subject):
    """Every trainable parameter is in the optimizer, with a learning rate."""
    from tools.doctor.probe import untouched

    probe = subject.probe
    with untouched(probe.model):
        found = parameter_groups(probe)
        if found is None:
            raise NotExamined("the model has no optimizer and does not say how to make one")
        groups, source = found
        known = {id(p) for group in groups for p in group["params"]}
        resting = {id(p) for group in groups for p in group["params"]
                   if group.get("initial_lr", group.get("lr")) is not None
                   and float(group.get("initial_lr", group.get("lr"))) == 0.0}
        slow = _slow_groups(subject, groups)
        trainable = {name: p for name, p in probe.model.named_parameters() if p.requires_grad}
        outside = [name for name, p in trainable.items() if id(p) not in known]
        still = [name for name, p in trainable.items() if id(p) in resting]
        total = sum(p.numel() for p in trainable.values())
        share = sum(trainable[name].numel() for name in outside) / max(total, 1)
    if outside:
        yield Finding(
            "not-in-optimizer",
            "prevents" if share > 0.1 or any(n.startswith("decoder.") for n in outside) else "warning",
            f"{len(outside)} of {len(trainable)} trainable parameter tensors ({share:.0%} of all values) are not in "
            "the "
            f"optimizer: {', '.join(parts(outside)[:6])}.",
            "They get gradients and never move. The optimizer was made from some of the parameters, or before a module "
            "was replaced (a new decoder after change_vocabulary, say).",
            {"tensors": len(outside), "of": len(trainable), "share of values": round(share, 4),
             "modules": parts(outside)[:20], "groups from": source},
            ["make the optimizer from model.parameters(), after the last change to the model"],
            0.97,
            where=outside[0],
        )
    if still:
        yield Finding(
            "lr-zero",
            "prevents",
            f"{len(still)} of {len(trainable)} trainable parameter tensors have a learning rate of 0: "
            f"{', '.join(parts(still)[:6])}.",
            "A parameter group was given lr 0: what is in it stays as it was initialised.",
            {"tensors": len(still), "of": len(trainable), "modules": parts(still)[:20]},
            ["give the group the recipe's learning rate, or leave its lr out"],
            0.95,
            where=still[0],
        )
    crawling = [name for name, p in trainable.items() if id(p) in slow]
    if crawling:
        yield _crawling(subject, crawling, trainable, slow, source)


@check("gradients", faults=("not-in-optimizer",), needs=("model",))
def modules_are_registered(subject):
    """Modules that the loss depends on are registered with the model, not kept in plain lists."""
    from tools.doctor.probe import unregistered

    probe = subject.probe
    hidden = unregistered(probe.model)
    if not hidden:
        return
    with probe.ready(train=True):
        backward(probe)
        used = {name: p.numel() for name, p in hidden.items() if p.grad is not None and bool(p.grad.any())}
    if not used:  # a teacher, say, that is kept out of the model on purpose
        return
    share = sum(used.values()) / (sum(used.values()) + sum(p.numel() for p in probe.model.parameters()))
    yield Finding(
        "not-in-optimizer",
        "prevents" if share > 0.1 else "warning",
        f"{len(used)} parameter tensors ({share:.0%} of all values) get gradients and are no parameters of the model: "
        f"{', '.join(parts(list(used))[:6])}.",
        "Their modules are in a plain list, tuple or dict: parameters() does not find them, so no optimizer has them, "
        "checkpoints lack them, and .to(device), train() and eval() pass them by. They stay as they were initialised.",
        {"tensors": len(used), "share of values": round(share, 4), "modules": parts(list(used))[:20]},
        ["nn.ModuleList([...]) in place of the list, nn.ModuleDict in place of the dict"],
        0.95,
        where=parts(list(used))[0],
    )


def _crawling(subject, names: list[str], trainable: dict, slow: dict, source: str) -> Finding:
    """The finding of parameters whose groups hardly learn."""
    from nemo.core.classes import ModelPT

    rates = sorted({slow[id(trainable[name])][0] for name in names})
    top = slow[id(trainable[names[0]])][1]
    share = sum(trainable[name].numel() for name in names) / max(sum(p.numel() for p in trainable.values()), 1)
    # Where there is only a model, nothing says that it does not come from a training of before.
    whole = subject.settings is not None and bool(subject.settings.prefix)
    from_scratch = whole and not any(subject.settings.get(key) for key in FROM_TRAINED)
    own = type(subject.model).configure_optimizers is not ModelPT.configure_optimizers
    one = len(rates) == 1
    return Finding(
        "lr-too-low",
        "prevents" if share > 0.1 and from_scratch else "warning",
        f"{len(names)} of {len(trainable)} trainable parameter tensors ({share:.0%} of all values) have "
        + (f"a group of their own with a learning rate of {rates[0]:.1g}, others {top:.1g}: " if one else
           f"groups with learning rates from {rates[0]:.1g} to {rates[-1]:.1g}, where the highest is {top:.1g}: ")
        + f"{', '.join(parts(names)[:6])}.",
        ("Groups are left over from a fine-tuning, whose encoder was to stay as it was. From scratch it stays random." if one
         else "A decay by layer was counted over parameters in place of layers, or from the wrong end: it falls by orders of "
              "magnitude within the model, and what has next to no rate stays as it was initialised."),
        {"tensors": len(names), "share of values": round(share, 4), "rate": rates[0], "lowest and highest of these":
         [rates[0], rates[-1]], "highest rate": top, "groups": len(rates), "groups from": source},
        ["configure_optimizers: " + ("one group, with the recipe's learning rate" if one else
                                     "one rate for all; a decay by layer only in a fine-tuning, 0.8 and more a layer")]
        if own else ["leave model.optim_param_groups out", "or give the group the recipe's learning rate"],
        0.9,
        where="configure_optimizers" if own else "model.optim_param_groups",
    )


def _slow_groups(subject, groups: list[dict]) -> dict[int, tuple[float, float]]:
    """Id of each parameter whose group learns a thousand times slower than another, and at a rate at which nothing
    moves -> (its rate, the highest of all groups), in absolute units."""
    from tools.doctor.schedule import lr_range, plan

    settings = subject.settings
    if settings is None:
        return {}
    base = settings.number("model.optim.lr")
    rates = [group.get("initial_lr", group.get("lr", base)) for group in groups]
    if any(rate is None for rate in rates) or not rates:
        return {}
    rates = [float(rate) for rate in rates]
    top = max(rates)
    try:
        peak = plan(subject).peak
    except NotExamined:
        peak = None
    unit = peak / base if peak and base else 1.0  # Noam's schedule multiplies
    return {id(p): (rate * unit, top * unit) for group, rate in zip(groups, rates) for p in group["params"]
            if 0 < rate < 1e-3 * top and rate * unit < lr_range(settings)[0] / 10}
