"""When does what is said come out? Late outputs leave the end of an utterance without frames."""

from __future__ import annotations

from statistics import median

import torch

from tools.doctor.finding import Finding, Plot
from tools.doctor.locality import STRETCHES, influence
from tools.doctor.registry import NotExamined, check

FRAMES = 1200  # of features, 12 s
HEARD = 1e-4  # of a stretch's largest effect: of causal layers the newest frame has the least, and not nothing
LATE, LOST = 0.4, 0.02  # seconds; share of the usual effect that the last stretch must have


@check("locality", faults=("time-scrambled",), needs=("model",))
def speech_comes_out_in_time(subject):
    """What is said comes out within half a second, and the end of it too."""
    probe = subject.probe
    probe.must_repeat()
    with probe.ready(), torch.no_grad():
        x, _ = probe.made_up_features([FRAMES], seed=7)
        moves = influence(probe, x, torch.tensor([FRAMES], device=x.device))
    if not bool(torch.isfinite(moves).all()) or float(moves.max()) < 1e-6 or moves.shape[1] < 40:
        raise NotExamined("outputs are too few, not finite, or do not depend on the input")
    effect = moves.amax(dim=1)
    usual = float(effect.median())
    begins, count = [], moves.shape[1]
    for s in range(1, STRETCHES - 1):  # a model may pad the first
        if float(effect[s]) > 0.1 * usual:
            first = int((moves[s] > HEARD * effect[s]).nonzero()[0])
            begins.append(first - s * count / STRETCHES)
    if len(begins) < 4:
        raise NotExamined("most stretches of the input hardly move the output")
    seconds = FRAMES / 100 / count * median(begins)
    end = float(effect[-1]) / usual
    if seconds < LATE or min(begins) < 0.5 * median(begins):
        return
    yield Finding(
        "time-scrambled", "prevents" if end < LOST or seconds > 1 else "warning",
        f"What is said comes out {seconds:.1f} s late: {median(begins):.0f} of {count} output frames"
        + (", and the end of an utterance never does." if end < LOST else "."),
        "Causal layers that are padded twice, or a shift that is not cut off again, push all outputs back. The lengths stay: "
        "of short utterances most of what is said lies behind them.",
        {"seconds late": round(seconds, 2), "effect of the last tenth, by the usual": round(end, 4),
         "frames late, by tenths of the input": [round(b, 1) for b in begins]},
        ["pad once: (kernel - 1) * dilation on the left, and padding=0 in the convolution",
         "cut as many frames from the front as are padded there"], 0.9, where="encoder",
        plots=[Plot("When each tenth of the input comes out", "tenth of the input", "frames late",
                    {"late": (list(range(1, len(begins) + 1)), begins)})])
