"""What goes into and comes out of each module in one forward pass, to name the first that breaks a property."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Step:
    """One call of a leaf module: its name, class, and first tensors in and out."""

    name: str
    kind: str
    entered: Tensor | None
    left: Tensor | None


def first_tensor(value) -> Tensor | None:
    """The first floating-point tensor in a value, looking into tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, torch.nn.utils.rnn.PackedSequence):
        return value.data
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return next((found for part in parts if (found := first_tensor(part)) is not None), None)


def trace(model: nn.Module, call: Callable[[], object], parts=("encoder", "decoder")) -> list[Step]:
    """The leaf modules under `parts` in the order in which they ran during `call`, with detached copies."""
    steps: list[Step] = []
    handles = []
    for part in parts:
        root = getattr(model, part, None)
        if not isinstance(root, nn.Module):
            continue
        for name, module in root.named_modules():
            if next(module.children(), None) is None:
                full = f"{part}.{name}" if name else part
                handles.append(module.register_forward_hook(_recorder(full, steps), with_kwargs=True))
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return steps


def _recorder(name: str, steps: list[Step]):
    def hook(module, args, kwargs, output):
        entered, left = first_tensor((args, kwargs)), first_tensor(output)
        steps.append(Step(name, type(module).__name__,
                          None if entered is None else entered.detach().clone(),
                          None if left is None else left.detach().clone()))

    return hook


def describe(step: Step) -> str:
    return f"{step.name} ({step.kind})"


def shortened(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor] | None:
    """Both cut to the smaller size along each axis in which they differ; None where they have nothing in common."""
    if a.dim() != b.dim():
        return None
    sizes = [min(x, y) for x, y in zip(a.shape, b.shape)]
    cut = tuple(slice(0, size) for size in sizes)
    return a[cut], b[cut]


def differs(a: Tensor | None, b: Tensor | None, tolerance: float) -> float:
    """Relative difference of what two tensors have in common; 0 where it is within tolerance or cannot be compared."""
    if a is None or b is None or (pair := shortened(a, b)) is None:
        return 0.0
    a, b = (tensor.double() for tensor in pair)
    scale = float(a.square().mean().sqrt())
    change = float((a - b).square().mean().sqrt()) / max(scale, 1e-12) if a.numel() else 0.0
    return change if change > tolerance else 0.0


def first_difference(one: list[Step], two: list[Step], tolerance: float = 1e-4, take=lambda tensor: tensor):
    """(step, whether its input differed already) of the first leaf module that two traces do not share; None without.

    `take` picks what is compared of each tensor (one item of a batch, say); it may return None.
    """
    for a, b in zip(one, two):
        if a.name != b.name:
            return None
        inside = differs(_taken(take, a.entered), _taken(take, b.entered), tolerance)
        if inside:
            return a, b, True
        if differs(_taken(take, a.left), _taken(take, b.left), tolerance):
            return a, b, False
    return None


def _taken(take, tensor):
    return None if tensor is None else take(tensor)
