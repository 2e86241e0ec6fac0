"""What is measured of a live step now and then: frames, targets, gradients, and how far it moves the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from tools.doctor import listen
from tools.doctor.trace import Trace

GRADIENT_LOOKS = 5


class Frames:
    """Blank rate, letter rate, spread and the level of the best constant output, from the CTC loss's own inputs."""

    def __init__(self, labels: list[str]):
        self.labels = labels
        self.counts: Tensor | None = None  # of targets, (V)

    def look(self, trace: Trace, call: listen.Call, step: int, measure_level: bool) -> None:
        """Adds a point to the trace's series; the level is measured at the first chance and where asked."""
        values, spread = listen.frame_counts(call).tolist(), float(listen.spread(call))
        seen = listen.target_counts(call)
        self.counts = seen if self.counts is None else self.counts + seen
        frames = max(sum(values), 1)
        letters = {index: value for index, value in enumerate(values) if index != call.blank}
        others = sum(letters.values())
        trace.add("blank_rate", step, values[call.blank] / frames)
        trace.add("spread", step, spread)
        if others >= 0.01 * frames:
            best = max(letters, key=letters.get)
            trace.add("letter_rate", step, letters[best] / others)
            trace.top_label = self.name(best)
        trace.add("labels_used", step, sum(value > 0 for value in letters.values()))
        shares = (self.counts.double() / self.counts.sum().clamp(min=1)).tolist()
        trace.target_share = {self.name(k): share for k, share in enumerate(shares) if share > 0}
        if trace.utterances_seen >= 8 and (trace.level is None or measure_level):
            level = listen.constant_level(call, self.counts)
            if level == level:
                trace.add("level", step, level)
                levels = sorted(trace.values("level"))
                trace.level = levels[len(levels) // 2]

    def name(self, index: int) -> str:
        return self.labels[index] if index < len(self.labels) else f"label {index}"


class Gradients:
    """Which parameters have had a gradient other than 0 in any of the first looks."""

    def __init__(self, parameters: list[tuple[str, torch.nn.Parameter]]):
        self.parameters = parameters
        self.seen: set[str] = set()
        self.looks = 0

    def look(self, trace: Trace) -> None:
        """Before an optimizer step; after the last look writes `trace.still`."""
        if self.looks >= GRADIENT_LOOKS:
            return
        present = [(name, p.grad) for name, p in self.parameters if p.grad is not None and name not in self.seen]
        if present:
            largest = torch.stack([gradient.detach().abs().amax() for _, gradient in present]).tolist()
            self.seen |= {name for (name, _), value in zip(present, largest) if value != 0}
        self.looks += 1
        if self.looks == GRADIENT_LOOKS:
            trace.still = [name for name, _ in self.parameters if name not in self.seen]
            values = sum(p.numel() for name, p in self.parameters if name not in self.seen)
            trace.still_share = values / max(sum(p.numel() for _, p in self.parameters), 1)


def some_matrices(model, count: int = 6, most: int = 1_000_000) -> list[torch.nn.Parameter]:
    """Trainable matrices of at most so many values, spread over the model."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2 and 64 <= p.numel() <= most]
    return matrices[::max(len(matrices) // count, 1)][:count]


class Movement:
    """How far one optimizer step moves the weights, relative to their size: the median over a few matrices."""

    def __init__(self, model):
        self.parameters = some_matrices(model)
        self.held: list | None = None

    def before(self) -> None:
        self.held = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def after(self) -> float | None:
        """Median of |change| / |weights| since `before`; None without it."""
        if not self.held:
            return None
        held, self.held = self.held, None
        sizes = torch.stack([torch.stack([(p - old).float().norm(), old.float().norm()])
                             for p, old in zip(self.parameters, held)]).tolist()
        ratios = sorted(moved / size for moved, size in sizes if size > 1e-6)  # not those that start at 0
        return ratios[len(ratios) // 2] if ratios else None
