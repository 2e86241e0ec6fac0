"""Rows that are stretches of long recordings (family "pairs"): do their offsets and durations go by the same clock?

Standard library only.
"""

from __future__ import annotations

from collections import defaultdict
from statistics import median

from tools.doctor.finding import Finding
from tools.doctor.registry import NotExamined, check

FEWEST = 20  # neighbouring rows of one recording, fewer say nothing
ALIKE = 0.01  # of the ratio of a step to the duration before it, by which most rows may differ
MOST = 0.7  # share of neighbours that have the same ratio, or overlap
CLOCKS = (8000, 11025, 16000, 22050, 32000, 44100, 48000)  # Hz


@check("pairs", faults=("data-mismatched-text",), needs=("manifests",))
def segments_follow_each_other(subject):
    """Rows of one recording follow each other, by the durations that they have."""
    judged = False
    for role, rows in subject.rows.items():
        recordings = defaultdict(list)
        for row in rows:
            if "offset" in row:
                recordings[row["audio_filepath"]].append((float(row["offset"]), row["duration"], row))
        steps = [(b[0] - a[0], a[1], a[2], b[2]) for parts in recordings.values() if len(parts) > 1
                 for parts in [sorted(parts, key=lambda part: part[:2])] for a, b in zip(parts, parts[1:])]
        if len(steps) < FEWEST:
            continue
        judged = True
        if (finding := _judge(role, steps)) is not None:
            yield finding
    if not judged:
        raise NotExamined(f"takes {FEWEST} rows with an offset that follow others of the same recording")


def _judge(role: str, steps: list[tuple]) -> Finding | None:
    ratios = [step / duration for step, duration, *_ in steps if duration > 0.3]
    usual = median(ratios)
    alike = sum(abs(ratio - usual) < ALIKE for ratio in ratios) / len(ratios)
    over = sum(ratio < 1 - ALIKE for ratio in ratios) / len(ratios)
    fits = alike >= MOST and abs(usual - 1) > 2 * ALIKE
    if not fits and over < MOST:
        return None
    clock = next(((a, b) for a in CLOCKS for b in CLOCKS if a != b and abs(a / b - usual) < ALIKE), None) if fits else None
    _, _, first, second = steps[0]
    return Finding(
        "data-mismatched-text", "prevents" if role == "train" and fits else "warning",
        f"Rows of {role} that follow each other in a recording begin {usual:.3f} times their duration apart"
        + (f", {alike:.0%} of them the same." if fits else f": {over:.0%} of them begin before the one before has ended."),
        "Offsets and durations do not go by the same clock: the longer the recording, the further is the audio that is read "
        "from where its text is said.",
        {"step by duration, median": round(usual, 4), "alike": round(alike, 3), "overlapping": round(over, 3),
         "rows": [first["_at"], second["_at"]]},
        [f"offsets in seconds: start sample / sampling rate of the recording itself, not {clock[0]} for {clock[1]} Hz or the "
         "other way round" if clock else "offsets and durations in seconds, both by the sampling rate of the recording itself",
         "listen to the last rows of a long recording"], 0.9 if fits else 0.7, where=second["_at"])
