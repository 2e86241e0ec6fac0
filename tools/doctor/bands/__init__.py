"""What healthy runs of a recipe look like at each step, learned from their curve.csv, and where a run lies outside.

    python -m tools.doctor.bands recipes/deepspeech2/results/mini.csv --recipe deepspeech2 --corpus mini

makes `<recipe>_<corpus>.json` in this folder again, from the curves of one or several seeds. A band says what is
usual, not what is right: outside it is a warning at most. Standard library only.
"""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

from tools.doctor.finding import Finding, Plot
from tools.doctor.registry import NotExamined

FOLDER = Path(__file__).resolve().parent
COLUMNS = ("loss_per_char", "blank_rate", "grad_norm", "val_wer", "val_cer")
SERIES = {"loss_per_char": "loss", "blank_rate": "blank_rate", "grad_norm": "grad_norm", "val_wer": "val_wer",
    "val_cer": "val_cer"}
REACH = 1.4  # a healthy run may be so much sooner or later
APART = 1.02  # steps of a band lie so far apart at least: its window is far wider, and a long run has thousands
MARGIN = {1: 0.5, 2: 0.35, 3: 0.25}  # widening, as a share of the value, by the number of runs; more runs: 0.15


def learn(curves: list[Path], recipe: str, corpus: str) -> dict:
    """The band of one or several healthy runs.

    At each step the lowest and the highest value of any run between step / 1.4 and step * 1.4, widened by a margin
    that shrinks with the number of runs. Raises ValueError for a file without a curve.
    """
    runs = [read_curve(path) for path in curves]
    margin = MARGIN.get(len(runs), 0.15)
    columns: dict[str, dict[str, list[float]]] = {}
    for column in COLUMNS:
        steps = _apart(sorted({step for run in runs for step, _ in run.get(column, [])}))
        band: dict[str, list[float]] = {"step": [], "low": [], "high": []}
        for step in steps:
            near = [v for run in runs for s, v in run.get(column, []) if step / REACH <= s <= step * REACH]
            band["step"].append(step)
            band["low"].append(round(min(near) * (1 - margin), 5))
            high = round(max(near) * (1 + margin), 5)
            band["high"].append(min(high, 1.0) if column == "blank_rate" else high)
        if steps:
            columns[column] = band
    steps = [max(step for points in run.values() for step, _ in points) for run in runs]
    return {"recipe": recipe, "corpus": corpus, "runs": len(runs), "steps": max(steps), "margin": margin,
        "columns": columns}


def _apart(steps: list[int]) -> list[int]:
    """The first and the last of the steps, and between them those that are at least APART times the one before."""
    kept = steps[:1]
    for step in steps[1:-1]:
        if step >= APART * kept[-1]:
            kept.append(step)
    return kept + steps[1:][-1:]


def read_curve(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Column to (step, value) of a curve.csv. Raises OSError, and ValueError naming the line where it holds no numbers."""
    columns: dict[str, list[tuple[int, float]]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            for name in COLUMNS:
                if row.get(name):
                    try:
                        value = float(row[name])
                        step = int(float(row["step"]))
                    except (KeyError, ValueError):
                        raise ValueError(f"{path}:{number}: {name} is {row[name]!r}, step {row.get('step')!r}: not "
                                         "numbers") from None
                    if math.isfinite(value):
                        columns.setdefault(name, []).append((step, value))
    if not columns:
        raise ValueError(f"{path}: no curve in it; columns wanted: step, {', '.join(COLUMNS)}")
    return columns


def load(recipe: str, corpus: str) -> dict | None:
    """The committed band of a recipe on a corpus, or None."""
    path = FOLDER / f"{recipe}_{corpus}.json"
    return json.loads(path.read_text(encoding="utf-8")) if recipe and corpus and path.is_file() else None


def at(band: dict, column: str, step: int) -> tuple[float, float] | None:
    """(low, high) at a step, from the nearest step of the band; None beyond its ends."""
    data = band["columns"].get(column)
    if not data or not data["step"][0] / REACH <= step <= data["step"][-1] * REACH:
        return None
    k = min(range(len(data["step"])), key=lambda i: abs(data["step"][i] - step))
    return data["low"][k], data["high"][k]


def corpus_of(name: str, train) -> str:
    """The corpus whose band a run can be held against: `name`, or "" where it trains on another manifest than that
    corpus's own, which every builder writes as <name>/train.json. `train` None: the configuration does not say."""
    return name if train is None or Path(str(train)).parts[-2:] == (name, "train.json") else ""


def outside(trace) -> list[Finding]:
    """Where a trace's end lies against the band of its recipe: a note inside, a warning well outside.

    Raises NotExamined where there is no band for it.
    """
    band = load(trace.recipe, trace.corpus)
    if band is None:
        raise NotExamined(f"there is no band of healthy runs of {trace.recipe} on {trace.corpus}")
    if trace.last_step < 5:
        return []
    if trace.planned and not 0.5 < trace.planned / band["steps"] < 2:
        raise NotExamined(f"the run is planned for {trace.planned} steps, those of the band had {band['steps']}")
    rows, out = {}, []
    for column, name in SERIES.items():
        points = [(s, v) for s, v in trace.get(name) if math.isfinite(v)]
        if not points or (name == "loss" and trace.loss_unit != "character"):
            continue
        recent = sorted(v for s, v in points if s >= 0.9 * points[-1][0])
        step, value = points[-1][0], recent[len(recent) // 2]
        limits = at(band, column, step)
        if limits is None:
            continue
        rows[column] = f"{value:.3g} at step {step}; healthy runs {limits[0]:.3g} to {limits[1]:.3g}"
        if value > limits[1] or (value < limits[0] and column == "blank_rate"):
            out.append(column)
    if not rows:
        return []
    bad = [column for column in out if column != "grad_norm"]
    seeds = f"{band['runs']} committed run{'s' * (band['runs'] != 1)}"
    head = f"At step {trace.last_step} a healthy run of {band['recipe']} on {band['corpus']} ({seeds})"
    key = "loss_per_char" if "loss_per_char" in rows else next(iter(rows))
    said = f"{head} has {key} {rows[key].split('runs ')[1]}: yours, {rows[key].split(' ')[0]}, is "
    return [Finding(
        "run-early" if not bad else "run-plateau", "warning" if bad else "note",
        said + (f"inside{'' if not out else '; ' + ', '.join(out) + ' outside'}." if key not in out
                else f"outside{'' if len(out) == 1 else ', with ' + ', '.join(c for c in out if c != key)}."),
        "Curves of healthy runs differ by seed; outside the band something is other than in them, not necessarily "
        "wrong."
        if bad else "It goes as these runs went.", rows,
        ["compare its config.yaml with the recipe's"] if bad else ["go on"], 0.4 if bad else 0.5,
        plots=_plots(trace, band, rows))]


def _plots(trace, band, rows) -> list[Plot]:
    plots = []
    for column in list(rows)[:3]:
        points = trace.get(SERIES[column])
        data = band["columns"][column]
        series = {"this run": ([p[0] for p in points], [p[1] for p in points])}
        for side in ("low", "high"):
            series[f"healthy, {side}"] = (data["step"], data[side])
        plots.append(Plot(f"{column} against healthy runs", "step", column, series))
    return plots
