"""Runs of one folder that are one run, begun again and again with the weights of before and nothing else.

Jobs of a cluster's queue that load the last checkpoint's weights: the loss goes on, step and schedule begin anew.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median

from tools.doctor import folders
from tools.doctor.finding import Finding
from tools.doctor.trace import Points, Trace

MOST = 12  # runs to read, the newest
ENDS = 3  # losses at either end
FELL = 0.9  # of the first loss of all: a run has learned something below that
KEPT = 0.5  # of what the run before had gained, that is there when the next begins
ALIKE = 0.1  # by which the rates of two schedules may differ at the same step


def chained(every: list[Path], read) -> Finding | None:
    """The finding, where each of these runs goes on with what the one before had learned, from step 0.

    Args:
        every: folders of runs, the oldest first.
        read: gives the Trace of a folder.
    """
    if len(every) < 2 or any(folders.begin(path) >= folders.LATER for path in every):
        return None
    traces = [read(path) for path in every[-MOST:]]
    if any(trace.planned and trace.last_step >= 0.98 * trace.planned for trace in traces[:-1]):
        return None  # stages, each with a plan of its own
    ends = [_ends(trace) for trace in traces]
    if None in ends:
        return None
    top = ends[0][0]
    for (_, before), (now, _) in zip(ends, ends[1:]):
        if not before < FELL * top or now > top - KEPT * (top - before):
            return None
    rates = [trace.get("lr") for trace in traces]
    known = all(rates)
    if known and not all(_alike(rates[0], other) for other in rates[1:]):
        return None
    highest = max((v for points in rates for _, v in points), default=0.0)
    losses = ", ".join(f"{first:.3g} to {last:.3g}" for first, last in ends[-6:])
    steps = [trace.last_step for trace in traces]
    return Finding(
        "run-ended", "warning",
        f"It was started {len(every)} times, each time from step 0, with the weights of the time before: the loss goes on "
        f"({losses})" + (f", and the learning rate is that of the first start each time ({rates[-1][0][1]:.2g} to "
                         f"{highest:.2g})." if known else "."),
        "Only weights are taken over. Steps, moments and schedule begin anew with each job: the warm-up is made again and "
        "again, and what the schedule has after it is never reached.",
        {"starts": len(every), "last step of each": steps, "losses, first and last of each": [list(e) for e in ends],
         "highest rate": highest if known else None},
        ["trainer.fit(model, ckpt_path='last') in place of load_state_dict or init_from_nemo_model: step, optimizer and "
         "schedule go on", "exp_manager.resume_if_exists=true exp_manager.resume_ignore_no_checkpoint=true (NeMo)"],
        0.9 if known else 0.8)


def from_nothing(every: list[Path], read) -> bool:
    """Whether each of these runs begins where the first began, though those before it had learned something."""
    traces = [read(path) for path in every[-MOST:]]
    ends = [_ends(trace) for trace in traces]
    if len(ends) < 2 or None in ends or any(t.planned and t.last_step >= 0.98 * t.planned for t in traces):
        return False
    top = ends[0][0]
    return all(before < FELL * top and now > top - (1 - KEPT) * (top - before) for (_, before), (now, _) in zip(ends, ends[1:]))


def _ends(trace: Trace) -> tuple[float, float] | None:
    """The losses at the beginning and at the end of a run."""
    losses = trace.values("loss")
    size = min(ENDS, len(losses) // 2)
    return (median(losses[:size]), median(losses[-size:])) if size > 1 else None


def _alike(one: Points, two: Points) -> bool:
    """Whether two schedules that change have the same rates at the same steps."""
    known = dict(one)
    pairs = [(known[step], rate) for step, rate in two if step in known]
    same = [abs(a - b) <= ALIKE * max(a, b, 1e-12) for a, b in pairs]
    changes = len({round(rate, 12) for rate, _ in pairs}) > 1
    return len(pairs) >= ENDS and changes and sum(same) >= 0.8 * len(same)
