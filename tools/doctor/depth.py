"""Do signals and gradients keep their size through the layers, and through time (200, 800, 1600 frames)?"""

from __future__ import annotations

import math
import time

import torch
from torch import nn

from tools.doctor.finding import Finding, Plot
from tools.doctor.loss import call_loss
from tools.doctor.registry import NotExamined, check
from tools.doctor.tracing import describe, first_tensor, shortened, trace

TOO_LARGE = 1e4  # root mean square of activations
FAINT = 3e-4  # share of an input's change that is left of it in a layer's output
FEWEST, GROWS = 5, 1.7  # layers of a stack, and the factor by which the size of their outputs may not grow in most of them
TIMES = (200, 800, 1600)  # feature frames


def size(tensor) -> float:
    return float(tensor.double().square().mean().sqrt()) if tensor is not None and tensor.numel() else 0.0


@check("depth", faults=("explodes", "vanishes"), needs=("model",))
def signals_through_depth(subject):
    """Activations neither explode nor lose the input with depth."""
    probe = subject.probe
    with probe.ready(), torch.no_grad():
        x, lengths = probe.features()
        steps = trace(probe.model, lambda: probe.forward(x, lengths))
        other = probe.made_up_features([x.shape[2]] * len(x), seed=3)[0] * float(x.std())
        changed = trace(probe.model, lambda: probe.forward(other, lengths))
    if not steps:
        raise NotExamined("the model has no modules to look at")
    sizes = [size(step.left) for step in steps]
    left = []
    for a, b in zip(steps, changed):
        pair = shortened(a.left, b.left) if a.left is not None and b.left is not None else None
        left.append(size(pair[0] - pair[1]) / max(size(pair[0]), 1e-30) if pair is not None else 1.0)
    at = list(range(len(steps)))
    plots = [Plot("Size of activations by depth", "module, in order", "root mean square", {"activations": (at, sizes)}),
             Plot("What is left of a change of the input", "module, in order", "change / size", {"signal": (at, left)})]
    finite = [(s, step) for s, step in zip(sizes, steps) if math.isfinite(s)]
    largest, where = max(finite, key=lambda pair: pair[0], default=(0.0, steps[0]))
    if largest > TOO_LARGE * max(size(x), 1.0):
        first = next(step for s, step in zip(sizes, steps) if s > 30 * max(size(x), 1.0))
        yield Finding(
            "explodes", "prevents",
            f"Activations grow to {largest:.2g} (root mean square) in {describe(where)}, from {size(x):.2g} at the "
            "input.",
            "Each layer makes its input larger: weights too large, no normalisation. The loss starts enormous, "
            "gradients "
            "overflow, and every step is clipped to next to nothing.",
            {"largest": largest, "first over 30 times the input": describe(first)},
            ["normalise between layers (LayerNorm, BatchNorm) or use torch's initialisation; look at the gain of "
             f"{first.name}"],
            0.9, where=first.name, plots=plots[:1],
        )
    faint = [(share, step) for share, step in zip(left, steps) if step.left is not None and share < FAINT]
    if faint and left[-1] < FAINT:
        share, step = faint[0]
        yield Finding(
            "vanishes", "prevents" if left[-1] < FAINT / 10 else "warning",
            f"Of a change of the whole input {left[-1]:.1g} is left at the output, less than {FAINT:g} from "
            f"{describe(step)} on.",
            "Layer by layer the input's share shrinks against what is the same for every input (biases, saturated "
            "activations, tiny weights): gradients shrink alike on the way back.",
            {"left at the output": left[-1], "first faint": describe(step)},
            ["larger initial weights (torch's defaults), normalisation between layers, residual connections, ReLU or "
             "SiLU "
             "in place of sigmoid"],
            0.85, where=step.name, plots=plots[1:],
        )


@check("depth", faults=("explodes",), needs=("model",))
def layers_add_to_what_they_are_given(subject):
    """What goes through a stack of alike layers grows by what each adds, not by a factor."""
    probe = subject.probe
    left: dict[str, float] = {}
    handles = []

    def watch(name: str):
        def hook(module, args, out) -> None:
            left.setdefault(name, size(first_tensor(out)))

        return hook

    for stack, modules in probe.model.named_modules():
        if isinstance(modules, (nn.ModuleList, nn.Sequential)) and len(modules) >= FEWEST and len({type(m) for m in modules}) == 1:
            handles += [module.register_forward_hook(watch(f"{stack}.{i}")) for i, module in enumerate(modules)
                        if next(module.children(), None) is not None]
    try:
        with probe.ready(), torch.no_grad():
            probe.forward(*probe.features())
    finally:
        for handle in handles:
            handle.remove()
    if len(left) < FEWEST:  # there is no stack that could grow
        return
    names, sizes = list(left), list(left.values())
    factors = [b / max(a, 1e-30) if name.rpartition(".")[0] == before.rpartition(".")[0] else 1.0
               for before, name, a, b in zip(names, names[1:], sizes, sizes[1:])]
    if sum(factor > GROWS for factor in factors) < max(FEWEST, 0.8 * len(factors)):
        return
    yield Finding(
        "explodes", "warning",
        f"Each of {len(factors) + 1} layers makes what it is given {min(factors):.1f} to {max(factors):.1f} times as large, from "
        f"{sizes[0]:.2g} to {sizes[-1]:.2g}.",
        "The residual is added twice, within the layer and around it: what a layer computes is small against what passes it by, "
        "and the smaller the higher the layer. Of the upper layers next to nothing counts.",
        {"size after each layer": {name: float(f"{value:.3g}") for name, value in left.items()}},
        ["add the residual once: return x + branch(norm(x))"], 0.88, where=names[0],
        plots=[Plot("Size of activations by layer", "layer", "root mean square", {"size": (list(range(len(sizes))), sizes)})])


@check("depth", faults=("vanishes", "explodes"), needs=("model",))
def gradients_through_depth(subject):
    """Gradients keep their size from the last layer to the first."""
    from tools.doctor.gradients import backward, parts

    probe = subject.probe
    with probe.ready(train=True):
        gradients, _ = backward(probe)
        weights = [(name, gradients[name], size(p.detach())) for name, p in probe.model.named_parameters()
                   if p.dim() > 1 and gradients.get(name, -1) > 0]
    if len(weights) < 3:
        raise NotExamined("too few weights get a gradient")
    bad = [name for name, g, _ in weights if not math.isfinite(g)]
    # Relative to the weights: how far a step would move them. Attention's and shortcuts' own smallness is not depth's.
    encoder = [(name, g) for name, g, _ in weights if name.startswith("encoder.")] or [(n, g) for n, g, _ in weights]
    quarter = max(len(encoder) // 4, 1)
    first, last = (max(g for _, g in part) for part in (encoder[:quarter], encoder[-quarter:]))
    plot = Plot("Gradients by depth", "weight, in order", "log10 of the root mean square",
                {"gradient": (list(range(len(weights))), [math.log10(max(g, 1e-30)) for _, g, _ in weights])})
    behind = max((g for name, g, _ in weights if name.startswith("decoder.")), default=0.0)
    if not bad and first > 1e5 * last and first < 1e3 * behind:
        idle = [name for name, g in encoder if g < 1e-5 * behind]
        yield Finding(
            "vanishes", "prevents" if len(idle) > 0.5 * len(encoder) else "warning",
            f"{len(idle)} of {len(encoder)} weights of the encoder have next to no gradient, between others that have one: "
            f"{', '.join(parts(idle)[:4])}.",
            "These layers are passed by: gates that are shut (a bias far from 0), branches with a factor of next to nothing. "
            "What they would learn never reaches them.",
            {"largest gradient of the first layers": first, "of the last": last, "of the decoder": behind},
            ["gates that begin half open: a bias of -1 to 1, not -20", "branches with a factor of 1, or of 0 that is itself "
             "learned (ReZero)"], 0.85, where=idle[0] if idle else "encoder", plots=[plot])
        return
    if bad or first > 1e5 * last or first > 1e6:
        yield Finding(
            "explodes", "prevents",
            f"The first training step has gradients of {first:.2g} in the first layers and {last:.2g} in the last"
            + (f"; not finite in {bad[0]}." if bad else "."),
            "Gradients grow on the way back through the layers (or through time): weights too large, a recurrence that "
            "is "
            "not bounded.",
            {"first quarter": first, "last quarter": last, "not finite": bad[:5]},
            ["normalise between layers; a gated recurrence in place of ReLU; smaller initial weights"],
            0.85, where=(bad or [encoder[0][0]])[0], plots=[plot],
        )
    elif first < 1e-5 * last:
        yield Finding(
            "vanishes", "prevents" if first < 1e-7 * last else "warning",
            f"Gradients of the first layers are {first:.2g}, of the last {last:.2g}: the first hardly move.",
            "They shrink on the way back through saturated activations, tiny weights or many layers without shortcuts.",
            {"first quarter": first, "last quarter": last, "ratio": first / last},
            ["residual connections and normalisation between layers, ReLU or SiLU in place of sigmoid or tanh"],
            0.85, where=encoder[0][0], plots=[plot],
        )


def over_time(probe, times=TIMES, backward: bool = False) -> dict[int, tuple[float, float]]:
    """Frames -> (size of the encoder's output over its last quarter, norm of the gradient or NaN)."""
    found = {}
    for frames in times:
        begin = time.thread_time()
        x, lengths = probe.made_up_features([frames], seed=2)
        held = []
        handle = probe.model.encoder.register_forward_hook(lambda m, a, o: held.append(o), with_kwargs=False)
        try:
            with torch.set_grad_enabled(backward):
                out, kept = probe.forward(x, lengths)
                encoded = held[-1][0] if isinstance(held[-1], (tuple, list)) else held[-1]
                end = encoded.detach()[..., -max(encoded.shape[-1] // 4, 1):]
                norm = float("nan")
                if backward:
                    count = max(int(kept[0]) // 4, 1)
                    targets = (torch.arange(count, device=x.device)[None] * 7 % max(out.shape[2] - 1, 1)).long()
                    loss = call_loss(probe.model, out, targets, kept, torch.full_like(kept, count)) / count
                    probe.model.zero_grad(set_to_none=True)
                    loss.backward()
                    gradients = [p.grad for p in probe.model.parameters() if p.grad is not None]
                    norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
        finally:
            handle.remove()
        found[frames] = size(end), norm
        if time.thread_time() - begin > 5.0 or probe.subject.seconds_left() < 10:
            break  # a larger model: what was seen so far has to do
    return found


@check("depth", faults=("explodes",), needs=("model",))
def signals_through_time(subject):
    """Activations and gradients do not grow with the length of an utterance."""
    probe = subject.probe
    with probe.ready(train=False):
        found = over_time(probe, backward=True)
    if len(found) < 2:
        raise NotExamined("the model is too slow for longer inputs within the budget")
    frames = list(found)
    sizes, norms = [found[t][0] for t in frames], [found[t][1] for t in frames]
    plot = Plot("Growth with length", "feature frames", "log10",
                {"activations": (frames, [math.log10(max(s, 1e-30)) if math.isfinite(s) else None for s in sizes]),
                 "gradient norm": (frames, [math.log10(max(n, 1e-30)) if math.isfinite(n) else None for n in norms])})
    broken = not all(math.isfinite(v) for v in [*sizes, *norms])
    growth, gradient_growth = sizes[-1] / max(sizes[0], 1e-30), norms[-1] / max(norms[0], 1e-30)
    if broken or growth > 10 or (gradient_growth > 300 and norms[-1] > 100):
        yield Finding(
            "explodes", "prevents" if broken or growth > 100 or gradient_growth > 300 else "warning",
            f"From {frames[0]} to {frames[-1]} frames activations grow {growth:.2g} times and gradients "
            f"{gradient_growth:.2g} times" + (", up to values that are not finite." if broken else "."),
            "The recurrence adds to or multiplies its state at every frame without a bound. Short utterances train, "
            "long "
            "ones give infinity and then NaN; clipping cannot help, since the norm itself is not finite.",
            {"frames": frames, "activations": sizes, "gradient norms": norms},
            ["a gated recurrence (model.encoder.rnn_type=lstm or gru), normalised input to it, or a bounded "
             "activation"],
            0.9, where="encoder", plots=[plot],
        )


@check("depth", faults=("explodes",), needs=("model",))
def recurrence_is_bounded(subject):
    """Recurrences stay bounded when their weights grow, as they do in training."""
    probe = subject.probe
    recurrent = [(name, p) for name, p in probe.model.named_parameters()
                 if p.dim() == 2 and ("weight_hh" in name or "recurrent" in name.rpartition(".")[2])]
    if not recurrent:
        return
    with probe.ready(), torch.no_grad():
        before = _recurrent_size(probe, 400)
        for _, weight in recurrent:
            # Largest gain 3 along some direction: a trained recurrence has gains over 1.
            weight.copy_(nn.init.orthogonal_(torch.empty_like(weight)) * 3.0)
        short, long = (_recurrent_size(probe, frames) for frames in (100, 400))
    grown = [(name, short.get(name, 0.0), after) for name, after in long.items() if not math.isfinite(after)
             or after > 1e3 * max(before.get(name, 1.0), 1.0) and after > 50 * short.get(name, 1.0)]
    if grown:
        name, early, after = grown[0]
        yield Finding(
            "explodes", "warning",
            f"The recurrence in {name} has no bound: with weights as training can make them its output grows to "
            f"{after:.2g} within 400 frames.",
            "A ReLU recurrence multiplies its state by the same matrix at every frame. Once training makes a gain "
            "larger "
            "than 1, long utterances overflow and the loss is NaN; zero_infinity and clipping come too late for that.",
            {"size at 100 frames": early, "at 400 frames": after, "as it is": before.get(name, 0.0)},
            ["model.encoder.rnn_type=lstm (or gru, tanh), or normalise the recurrence's input and clip its state"],
            0.85, where=name,
        )


def _recurrent_size(probe, frames: int) -> dict[str, float]:
    """Name of each module that holds recurrent weights -> largest absolute value of its output.

    Where such a module is not called itself, since the one around it reads its weights, it is that one's output.
    """
    from tools.doctor.tracing import first_tensor

    found: dict[str, float] = {}
    handles, owners = [], []
    modules = dict(probe.model.named_modules())
    for name, module in modules.items():
        own = [n for n, _ in module.named_parameters(recurse=False) if "weight_hh" in n or "recurrent" in n]
        if own or isinstance(module, nn.RNNBase):
            owners.append(name)
    around = {part for name in owners for part in _around(name)}
    for name in sorted(around):
        def hook(m, args, output, name=name):
            tensor = first_tensor(output)
            if tensor is not None and tensor.numel():
                found[name] = float(tensor.abs().max())
        handles.append(modules[name].register_forward_hook(hook))
    try:
        x, lengths = probe.made_up_features([frames], seed=4)
        probe.forward(x, lengths)
    finally:
        for handle in handles:
            handle.remove()
    nearest = {name: next((part for part in _around(name) if part in found), None) for name in owners}
    return {part: found[part] for part in nearest.values() if part is not None}


def _around(name: str) -> list[str]:
    """A module's name and those of the modules around it, inside the encoder or decoder, the nearest first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 1, -1)] or [name]
