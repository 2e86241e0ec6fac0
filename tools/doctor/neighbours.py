"""Neighbouring frames keep their order, at the output and on the way through each module; and order is known."""

from __future__ import annotations

import time

import torch

from tools.doctor.finding import Finding, Plot
from tools.doctor.locality import ABROAD, LONGER, STRETCHES, at_distance, delayed, over_time, replaced
from tools.doctor.probe import relative
from tools.doctor.registry import NotExamined, check
from tools.doctor.tracing import Step, trace

FRAMES = 480  # of made-up input: twelve times 40, so that most subsamplings divide it
MOVED = 0.8  # change, by the spread of the outputs, that a shift by one output frame must not make
BESIDE = 2.0  # output frames between a change and where it is heard most, on average
SUSPECTS = 3  # modules whose way to the output is followed
BLIND = 1e-3  # change, by the spread, under which shuffled frames give the shuffled output


@check("neighbours", faults=("time-scrambled", "order-unknown"), needs=("model",))
def neighbours_keep_their_order(subject):
    """Neighbouring frames come out in their order, and the model knows what that order is."""
    probe = subject.probe
    probe.must_repeat()
    with probe.ready(), torch.no_grad():
        begin = time.thread_time()
        x, out, step, moved = _earlier(probe, FRAMES)
        _must_be_cheap(subject, begin, 1)
        beside = _beside(probe, x, out, step) if moved > MOVED else 0.0
        # A stack of wide convolutions feels the ends of the input everywhere: of a long one the middle is free of them.
        moved = _earlier(probe, LONGER[-1])[3] if beside > BESIDE else 0.0
        alike = _blind(probe, x, out, step) if FRAMES == len(out) * step else 1.0
    if moved > MOVED:
        yield Finding(
            "time-scrambled",
            "warning",  # a right model that puts out many frames at once for a chunk of the input does so too
            f"Frames are in order over the utterance and not among their neighbours: a change is heard most "
            f"{beside:.1f} output frames from where it was made, and the input one output frame ({step} of the input) "
            f"later gives an output that differs by {moved:.0%} of its spread from the same one frame later.",
            "Time and features are mixed within chunks: unfold(1, C, C) gives (B, chunks, D, C), and a reshape to "
            "(-1, C, D) takes features for frames. CTC needs frames in the order of speech.",
            {"change by a shift of one output frame": round(moved, 3),
             "output frames between a change and where it is heard": round(beside, 2)},
            ["x.reshape(B, T // C, C, D) in place of unfold, or x.unfold(1, C, C).transpose(2, 3) before the reshape"],
            0.8,
            where="encoder",
        )
    if alike < BLIND:
        yield Finding(
            "order-unknown",
            "warning",
            f"Frames in another order give the same outputs in that order (difference {alike:.1g} of their spread): "
            "the model hears other frames, and does not know which come before and which after.",
            "Attention without positions takes frames for a set. It can learn which sounds are in an utterance, not "
            "which follow each other.",
            {"difference": alike, "frames shuffled in groups of": step},
            ["add positions to what attention gets: x = x + positions[:, :T], relative ones (NeMo's "
             "self_attention_model: rel_pos), or a convolution over time before it"],
            0.9,
            where="encoder",
        )


def _earlier(probe, size: int):
    """(made-up features (1, D, size), their output (T', V+1), input frames an output frame, how much the middle of the
    output changes, by its spread, where the input begins one output frame later and the output is put back by one)."""
    x, _ = probe.made_up_features([size + 64], seed=6)
    lengths = torch.tensor([size], device=x.device)
    out = probe.forward(x[:, :, :size], lengths)[0][0]
    frames = len(out)
    step = round(size / max(frames, 1))
    if frames < 40 or step > 64 or abs(size / step - frames) > 0.1 * frames:
        raise NotExamined(f"{frames} output frames for {size} of the input")
    begun = probe.forward(x[:, :, step : size + step], lengths)[0][0]
    if not bool(torch.isfinite(out).all() and torch.isfinite(begun).all()):
        raise NotExamined("outputs are not finite")
    edge = frames // 4
    middle = out[edge + 1 : frames - edge]
    still = float((middle - middle.mean(dim=0)).norm()) < 1e-3 * float((middle - middle.mean()).norm())
    return x[:, :, :size], out, step, 0.0 if still else relative(begun[edge : frames - edge - 1] - middle, middle)


def _beside(probe, x, out, step: int) -> float:
    """Mean distance, in output frames, from three frames that are replaced to where the output changes most; a delay
    that all share is taken out."""
    frames = len(out)
    away = []
    for at in range(frames // 8, frames - frames // 8 - 3, max(frames // 16, 5)):
        changed = x.clone()
        changed[:, :, at * step : (at + 3) * step] = x[:, :, : 3 * step]
        moves = (probe.forward(changed, torch.tensor([x.shape[2]], device=x.device))[0][0] - out).norm(dim=1)
        away.append(int(moves.argmax()) - at - 1)
    delay = sorted(away)[len(away) // 2]
    return sum(abs(a - delay) for a in away) / len(away)


def _blind(probe, x, out, step: int) -> float:
    """Difference, by the spread, of the output of shuffled frames from the shuffled output; 1 where each output frame
    hears its own frames only, so that there is no order to know."""
    frames, lengths = len(out), torch.tensor([x.shape[2]], device=x.device)
    order = torch.randperm(frames, generator=torch.Generator().manual_seed(0)).to(x.device)
    shuffled = x.view(1, x.shape[1], frames, step)[:, :, order].reshape(x.shape)
    difference = relative(probe.forward(shuffled, lengths)[0][0] - out[order], out)
    if difference < BLIND:
        half = frames // 2
        changed = torch.cat([x[:, :, : half * step], x[:, :, half * step :].flip(1)], dim=2)
        heard = relative((probe.forward(changed, lengths)[0][0] - out)[:half], out)
        return difference if heard > 10 * BLIND else 1.0
    return difference


@check("neighbours", faults=("time-scrambled",), needs=("model",))
def time_is_kept_inside(subject):
    """Frames belong to their time on the way through each module, whatever a shortcut around it hides."""
    probe = subject.probe
    probe.must_repeat()
    with probe.ready(), torch.no_grad():
        (x, lengths), (shorter, fewer) = (probe.made_up_features([size], seed=7) for size in (FRAMES, FRAMES - 96))
        changed = replaced(probe, x)
        begin = time.thread_time()
        steps = _traced(probe, x, lengths)
        _must_be_cheap(subject, begin, STRETCHES + 2)
        axes = [_time_axis(a, b) for a, b in zip(steps, _traced(probe, shorter, fewer))]
        moves: dict[int, list] = {k: [] for k, axis in enumerate(axes) if axis is not None}
        for features in changed:
            for k, step in enumerate(_traced(probe, features, lengths)):
                if k in moves and step.left is not None and step.left.shape == steps[k].left.shape:
                    moves[k].append(over_time(step.left - steps[k].left, axes[k]))
        found = [(k, torch.stack(m)) for k, m in moves.items() if len(m) == STRETCHES]
        found = [(k, at_distance(m)) for k, m in found if _elsewhere(m)][:SUSPECTS]
        # A recurrence that runs backwards meets the end first, and is turned round after it: only the whole way counts.
        out = probe.forward(x, lengths)[0]
        for k, heard in found:
            through = torch.stack([over_time(_by_way_of(probe, steps, k, x, c, lengths) - out, 1) for c in changed])
            if bool(torch.isfinite(through).all()) and _elsewhere(through):
                break
        else:
            return
    whole = at_distance(through)
    name = steps[k].name
    yield Finding(
        "time-scrambled",
        "warning",
        f"What {name} ({steps[k].kind}) puts out at a time hears that time less ({heard[0]:.2f} of the strongest) than "
        "others, and so does what it adds to the output"
        f" ({whole[0]:.2f}); a shortcut around it keeps the order of the rest.",
        f"Time is out of order at the input of {name}: repeat where repeat_interleave belongs lays the utterance "
        "twice over itself, a view or reshape stands where a transpose belongs, or a direction is not turned back.",
        {"influence by distance, in tenths of the utterance": [round(value, 3) for value in heard],
         f"of the output by way of {name}": [round(value, 3) for value in whole]},
        ["up-sampling: x.repeat_interleave(2, dim=1) in place of x.repeat(1, 2, 1), on (B, T, D)",
         "x.transpose(1, 2) in place of x.view or x.reshape"],
        0.85,
        where=name,
        plots=[Plot("What an output frame hears", "distance / length of the utterance", "share of the strongest",
                    {name: ([d / STRETCHES for d in range(STRETCHES)], heard),
                     "the output by way of it": ([d / STRETCHES for d in range(STRETCHES)], whole)},
                    "right is 1 at distance 0 and little elsewhere")],
    )


def _must_be_cheap(subject, begin: float, more: int) -> None:
    """Raises NotExamined where `more` runs as long as that since `begin` would take a third of the time left."""
    if (time.thread_time() - begin) * more > subject.seconds_left() / 3:
        raise NotExamined("the model is too slow for it within the budget")


def _traced(probe, x, lengths) -> list[Step]:
    return trace(probe.model, lambda: probe.forward(x, lengths), ("encoder",))


def _time_axis(a: Step, b: Step) -> int | None:
    """The one axis along which two lengths of input make what a module puts out differ in size, if it is of 16 and
    more."""
    if a.name != b.name or a.left is None or b.left is None or a.left.dim() != b.left.dim():
        return None
    axes = [i for i, (p, q) in enumerate(zip(a.left.shape, b.left.shape)) if p != q]
    return axes[0] if len(axes) == 1 and a.left.shape[axes[0]] >= 16 else None


def _elsewhere(moves) -> bool:
    """Whether most frames hear the input, and of it other times more than their own."""
    most = moves.amax(dim=0)
    if not bool(torch.isfinite(moves).all()) or float((most > 1e-3 * most.max()).float().mean()) < 0.8:
        return False
    heard = at_distance(moves)
    return heard[0] < ABROAD and max(heard[2:8]) > heard[0] and not delayed(moves)


def _by_way_of(probe, steps: list[Step], k: int, x, changed, lengths):
    """Outputs for `x` when the k-th step alone puts out what it puts out for `changed`."""
    module = probe.model.get_submodule(steps[k].name)
    number = sum(step.name == steps[k].name for step in steps[:k])  # of its calls
    seen: list = []

    def keep(module, args, output):
        seen.append(output.clone() if isinstance(output, torch.Tensor) else output)

    def give(module, args, output):
        calls.append(None)
        return seen[number] if len(calls) == number + 1 else output

    for hook, features in ((keep, changed), (give, x)):
        calls: list = []
        handle = module.register_forward_hook(hook)
        try:
            out = probe.forward(features, lengths)[0]
        finally:
            handle.remove()
    return out
