"""Does what is said at a time come out at that time? Perturbs stretches of input and sees where the output moves."""

from __future__ import annotations

import torch

from tools.doctor.finding import Finding, Plot
from tools.doctor.registry import NotExamined, check

STRETCHES = 10
LONGER = (320, 1600, 3200)  # frames to ask again with before a verdict
IN_ORDER, OUT_OF_ORDER = 0.75, 0.45  # correlation of where the input changed and where the output did
AT_HOME, ABROAD = 0.6, 0.4  # influence of a frame's own stretch of input, relative to that of the strongest stretch


def influence(probe, x, lengths):
    """(S, T'): how much each output frame moves when the s-th stretch of the one item `x` (1, D, T) is replaced."""
    out, _ = probe.forward(x, lengths)
    return torch.stack([over_time(probe.forward(c, lengths)[0] - out, 1) for c in replaced(probe, x)])


def replaced(probe, x) -> list:
    """`x` (1, D, T) as often as there are stretches, with one of them replaced by other features in each."""
    frames = x.shape[2]
    other, _ = probe.made_up_features([frames], seed=11)
    other = other * float(x.std())
    found = []
    for s in range(STRETCHES):
        begin, end = s * frames // STRETCHES, (s + 1) * frames // STRETCHES
        changed = x.clone()
        changed[:, :, begin:end] = other[:, :, begin:end]
        found.append(changed)
    return found


def over_time(change, axis: int):
    """(T) root mean square of a change over all axes but that of time."""
    return change.float().movedim(axis, 0).flatten(1).square().mean(dim=1).sqrt()


def order(moves) -> tuple[float, list[float]]:
    """(correlation of an output frame's place with that of the input it depends on, that place of each frame)."""
    weight = moves.double().square()
    total = weight.sum(dim=0)
    heard = total > 1e-4 * total.median().clamp(min=1e-30)
    centres = (torch.arange(moves.shape[0], dtype=torch.float64, device=moves.device) + 0.5) / moves.shape[0]
    place = (weight * centres[:, None]).sum(dim=0) / total.clamp(min=1e-30)
    t = (torch.arange(moves.shape[1], dtype=torch.float64, device=moves.device) + 0.5) / moves.shape[1]
    if int(heard.sum()) < 8:
        return 0.0, place.tolist()
    a, b = t[heard] - t[heard].mean(), place[heard] - place[heard].mean()
    bound = float(a.norm() * b.norm())
    # All frames depend on the same input: there is no order at all.
    return (float((a * b).sum()) / bound if float(b.std()) > 1e-3 and bound > 0 else 0.0), place.tolist()


def _by_place(moves) -> tuple:
    """(influence (S, T'), 0 to 1 of a frame's strongest; how many stretches (S, T') each lies before the frame)."""
    stretches, frames = moves.shape
    share = moves.double() / moves.double().amax(dim=0, keepdim=True).clamp(min=1e-30)
    own = ((torch.arange(frames, device=moves.device) + 0.5) * stretches / frames).long()
    return share, own[None] - torch.arange(stretches, device=moves.device)[:, None]


def at_distance(moves) -> list[float]:
    """Mean influence, 0 to 1 of a frame's strongest, of the stretches that lie 0, 1, 2 ... stretches from the frame."""
    share, before = _by_place(moves)
    return [float(share[before.abs() == distance].mean()) for distance in range(len(moves))]


def delayed(moves) -> bool:
    """Whether all frames hear best what lies as many stretches before them, as behind a deep stack of causal layers."""
    share, before = _by_place(moves)
    return any(float(share[before == d].mean()) > AT_HOME for d in range(1, 4))


@check("locality", faults=("time-scrambled",), needs=("model",))
def time_is_kept(subject):
    """What changes at a time of the input changes the output at that time."""
    probe = subject.probe
    probe.must_repeat()
    with probe.ready(), torch.no_grad():
        x, lengths = probe.features()
        item = int(lengths.argmax())
        x, lengths = x[item : item + 1, :, : int(lengths[item])], lengths[item : item + 1]
        moves = influence(probe, x, lengths)
        if not bool(torch.isfinite(moves).all()):
            raise NotExamined("outputs are not finite")
        if float(moves.max()) < 1e-6:
            raise NotExamined("outputs do not depend on the input")
        if moves.shape[1] < 8:
            raise NotExamined(f"only {moves.shape[1]} output frames for {x.shape[2]} of the input")
        together, place = order(moves)
        heard = at_distance(moves)
        if together > OUT_OF_ORDER and heard[0] > AT_HOME:
            return
        # A stack of wide convolutions (QuartzNet 15x5) blurs three seconds altogether, and keeps the order of ten.
        longer = {}
        for size in LONGER:
            noise, _ = probe.made_up_features([size], seed=5)
            moves = influence(probe, noise, torch.tensor([size], device=noise.device))
            longer[size], _ = order(moves)
            far = at_distance(moves)
            if longer[size] > IN_ORDER and far[0] > AT_HOME:
                return
            if together < -0.6 and longer[size] < -0.6 or subject.seconds_left() < 10:
                break
    if together > OUT_OF_ORDER:
        yield from _laid_over(heard, far, size)
        return
    flipped = together < -0.6
    blurred = float(torch.tensor(place).std()) < 0.05
    yield Finding(
        "time-scrambled",
        "prevents",
        "Time runs backwards through the model: what changes at the start of the input moves the end of the output."
        if flipped else
        "Every output frame depends on the whole input alike: the output does not say when anything was "
        "said." if blurred
        else f"What changes at one time of the input moves the output at other times (correlation {together:.2f}; 1 is "
        "right).",
        "The time axis is flipped and not flipped back." if flipped else
        "Pooling or attention removed the order of time, or positions are lost." if blurred else
        "A view or reshape stands where a transpose belongs, so that features of one frame are spread over many, or "
        "one "
        "direction of a recurrence is not turned back. CTC needs frames in the order of speech.",
        {"correlation": round(together, 3),
         "on made-up features, by their frames": {size: round(value, 3) for size, value in longer.items()}},
        ["undo the flip: x.flip(time_axis) before and after, each within its length"] if flipped else
        ["x = x + attention(norm(x)): attention that is not added to what went into it averages all frames",
         "no pooling over time before the decoder; positions in what attention gets"] if blurred else
        ["x.transpose(1, 2) in place of x.view(B, T, D) or x.reshape(B, T, D); check a (B, C, T, F) tensor before it "
         "is "
         "flattened: permute to (B, T, C, F) first"],
        0.95 if abs(together) < 0.3 or flipped else 0.75,
        where="encoder",
        plots=[Plot("Where each output frame looks", "output frame / all", "input time / all",
                    {"seen": ([(i + 0.5) / len(place) for i in range(len(place))], place),
                     "right": ([0.0, 1.0], [0.0, 1.0])})],
    )


def _laid_over(heard: list[float], far: list[float], frames: int):
    """A finding where frames are in order and yet hear other times as much as their own, however long the input."""
    if heard[0] > ABROAD or far[0] > ABROAD or max(far[2:8]) < far[0]:
        return  # blurred, not elsewhere
    distance = max(range(2, 8), key=lambda d: far[d])
    yield Finding(
        "time-scrambled",
        "prevents",
        f"An output frame hears its own time less ({far[0]:.2f} of the strongest) than times that lie "
        f"{distance / STRETCHES:.0%} of the utterance away ({far[distance]:.2f}), in {frames} frames as in a few.",
        "Stretches of the utterance are laid over each other: frames are stacked by a view of (B, D, T), which takes "
        "values of one feature for neighbours in time. CTC needs frames that hear their own time.",
        {"influence by distance, in tenths of the utterance": [round(value, 3) for value in heard],
         f"with {frames} frames": [round(value, 3) for value in far]},
        ["stack frames of (B, T, D): x.transpose(1, 2) first, then reshape to (B, T / n, n * D)"],
        0.9,
        where="encoder",
        plots=[Plot("What an output frame hears", "distance / length of the utterance", "share of the strongest",
                    {"this input": ([d / STRETCHES for d in range(STRETCHES)], heard),
                     f"{frames} frames": ([d / STRETCHES for d in range(STRETCHES)], far)},
                    "right is 1 at distance 0 and little elsewhere")],
    )
