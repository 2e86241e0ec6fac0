"""Reads the curves of anybody's trainer: a CSV with a column of steps, TensorBoard events. TensorBoard is imported only
where there are files for it."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from statistics import median

from tools.doctor.trace import Points

STEP_NAMES = ("step", "global_step", "trainer/global_step", "steps", "_step")  # the last: W&B's
TIMING = ("train_step_timing in s", "train_step_timing")


def joined(sittings: Iterable[dict[str, Points]]) -> dict[str, Points]:
    """Columns of a run from those of its sittings, oldest first: what a later one repeats replaces what the earlier one
    had after its step."""
    columns: dict[str, Points] = {}
    for sitting in sittings:
        for name, points in sitting.items():
            first = points[0][0]
            columns[name] = [p for p in columns.get(name, []) if p[0] < first] + points
    return columns


def first_steps(path: Path, most: int = 4) -> list[int]:
    """The first steps of a file, so many that a curve can be told from a few numbers; read no further than that."""
    if path.suffix == ".csv":
        return sorted({step for points in read_csv(path).values() for step, _ in points})[:most]
    try:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

        steps: set[int] = set()
        for event in EventFileLoader(str(path)).Load():
            if event.HasField("summary"):
                steps.add(event.step)
            if len(steps) == most:
                break
        return sorted(steps)
    except Exception:  # no TensorBoard, or a file cut off in the middle, which raises several kinds
        return []


def read_csv(path: Path) -> dict[str, Points]:
    """Columns of a CSV with a column of steps; cells that are no number are passed over, NaN and inf are kept.

    A last line without its end is left out: it was cut, and half a number is another number.
    """
    columns: dict[str, Points] = {}
    try:
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            lines = (line for line in file if line.endswith(("\n", "\r")))
            reader = csv.DictReader(lines)
            key = next((name for name in STEP_NAMES if name in (reader.fieldnames or ())), None)
            if key is None:
                return {}
            for row in reader:
                try:
                    step = int(float(row[key]))
                except (TypeError, ValueError):
                    continue
                for name, cell in row.items():
                    if name not in (None, key) and isinstance(cell, str) and cell.strip():
                        try:
                            columns.setdefault(name, []).append((step, float(cell)))
                        except ValueError:
                            continue
    except (OSError, csv.Error):
        return {}
    return columns


def read_events(path: Path) -> tuple[dict[str, Points], Points]:
    """(columns, share of the time waited for data) of one TensorBoard event file."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        return {}, []
    try:
        events = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 1, "images": 1, "histograms": 1})
        events.Reload()
        tags = events.Tags().get("scalars", [])
    except Exception:  # a file cut off in the middle raises several kinds
        return {}, []
    columns = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}
    waits: Points = []
    timing = next((tag for tag in TIMING if tag in tags), None)
    if timing is not None:
        scalars = events.Scalars(timing)
        for before, after in zip(scalars, scalars[1:]):
            steps, seconds = after.step - before.step, after.wall_time - before.wall_time
            if steps > 0 and seconds > 0 and after.value > 0:
                waits.append((after.step, min(max(1 - after.value * steps / seconds, 0.0), 1.0)))
        # Validations and checkpoints lie between some: what is usual between two is the loader's.
        if len(waits) >= 5:
            middle = median(v for _, v in waits)
            waits = [(s, min(v, 2 * middle + 0.05)) for s, v in waits]
        else:
            waits = []
    return columns, waits
