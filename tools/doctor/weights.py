"""Weights that are not what the model's size says: channels that are all one, layers that are one module."""

from __future__ import annotations

import math

import torch

from tools.doctor.finding import Finding
from tools.doctor.gradients import backward, parts
from tools.doctor.registry import check


@check("weights", faults=("channels-alike",), needs=("model",))
def channels_differ(subject):
    """The channels of a layer have weights or gradients that differ."""
    probe = subject.probe
    dropouts = any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in probe.model.modules())
    with probe.ready(train=True):
        equal = {name: p for name, p in probe.model.named_parameters()
                 if p.requires_grad and _rows_alike(p) is not None}
        if not equal:
            return
        backward(probe)
        alike = [name for name, p in equal.items() if p.grad is not None and _move_together(p)]
        sizes = {name: p.numel() for name, p in probe.model.named_parameters() if p.requires_grad}
    if not alike:
        return
    share = sum(sizes[name] for name in alike) / sum(sizes.values())
    yield Finding(
        "channels-alike",
        "prevents" if share > 0.2 and not dropouts else "warning",
        f"In {len(alike)} weight matrices ({share:.0%} of all values) the output channels have the same weights and "
        f"get the same gradients: {', '.join(parts(alike)[:6])}.",
        "They were set to a constant. All channels of such a layer compute the same and are moved alike for ever, so "
        "that the layer has the capacity of one channel"
        + ("; only dropout can make them differ, slowly." if dropouts else "."),
        {"matrices": len(alike), "share of values": round(share, 4), "modules": parts(alike)[:20]},
        ["initialise weights at random: torch.nn.init.kaiming_uniform_ or xavier_uniform_ in place of constant_ (which "
         "is for biases and gains)"],
        0.95,
        where=parts(alike)[0],
    )


def _rows_alike(p) -> torch.Tensor | None:
    """For each row of a matrix the number of the group of equal rows it belongs to; None where most rows differ.

    A group a gate, or one each for queries, keys and values, is as bad as one.
    """
    if p.dim() < 2 or p.shape[0] < 8 or not p.is_floating_point():
        return None
    rows = p.detach().float().flatten(1)
    scale = rows.abs().max().clamp(min=1e-30)
    if not float((rows[0] - rows[1]).abs().max()) <= 1e-5 * float(scale):
        return None
    groups, group = torch.unique((rows / scale * 1e4).round(), dim=0, return_inverse=True)
    return group if len(groups) <= p.shape[0] // 8 else None


def _move_together(p) -> bool:
    """Whether rows that are equal have equal gradients, other than 0."""
    group, gradient = _rows_alike(p), p.grad.detach().float().flatten(1)
    largest = float(gradient.abs().max())
    if not 0 < largest < math.inf:
        return False
    first = torch.stack([gradient[int((group == g).nonzero()[0, 0])] for g in range(int(group.max()) + 1)])
    return float((gradient - first[group]).abs().max()) <= 1e-3 * largest


@check("weights", faults=("layers-shared",), needs=("model",))
def layers_are_different_modules(subject):
    """The layers of a list are modules of their own."""
    found = []
    for name, module in subject.probe.model.named_modules():
        if isinstance(module, (torch.nn.ModuleList, torch.nn.Sequential)):
            layers = [m for m in module if any(p.dim() > 1 for p in m.parameters())]
            once = {id(m): m for m in layers}
            if len(once) < len(layers):
                found.append((name, len(layers), list(once.values())))
    for name, count, once in found:
        values = sum(p.numel() for m in once for p in m.parameters())
        yield Finding(
            "layers-shared",
            "warning",
            f"{name} has {count} layers and {'one module' if len(once) == 1 else f'{len(once)} modules'} for them: "
            f"they share {values:,} weights.",
            "[Block()] * n is n times the same block. The model has fewer weights than its depth says, and trains to "
            "a higher loss. A few models mean it (ALBERT, Universal Transformer).",
            {"layers": count, "modules": len(once), "values": values},
            ["torch.nn.ModuleList([Block() for _ in range(n)]), or copy.deepcopy(block) for each"],
            0.7,
            where=name,
        )
