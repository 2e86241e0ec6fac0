"""history.md and curves.png: what was seen, what the doctor said, the cause, the fix, and the curve after it."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

from tools.histories.history import History
from tools.report.curve import LETTER_FREQUENCY_LOSS

TITLES = {"broken": "As reported", "one_batch": "On one batch", "fixed": "Repaired"}
COLOURS = {"broken": "C3", "one_batch": "C1", "fixed": "C0"}
ROWS = 12  # of a curve's table


def write(history: History, seen: dict[str, dict], out: Path, command: str) -> Path:
    """Writes curves.png, the curves as VERSION.csv, and history.md into `out`; returns the latter's path.

    `seen` is version to what training.train returned; the runs are in `out`/VERSION.
    """
    curves = {version: read(out / version / "curve.csv") for version in seen}
    for version in seen:
        (out / f"{version}.csv").write_bytes((out / version / "curve.csv").read_bytes())
    draw(history, curves, out / "curves.png")
    lines = [f"# {history.title}", "", f"Recipe `{history.recipe}`. {history.saw}", "", f"    {command}", ""]
    for version, run in seen.items():
        lines += [f"## {TITLES[version]}", ""]
        if version == "one_batch":
            lines += ["The same model on eight utterances, all of them in each step.", ""]
        elif version == "broken":
            lines += [f"**Cause.** {history.cause}", "", "Changed against the recipe:", ""]
        else:
            lines += [f"**Fix.** {history.fix}", ""]
        if version != "one_batch":
            lines += [f"    {line}" for line in history.lines(version)]
        if version == "broken" and history.model:
            lines.append(f"    (trained by {history.model})")
        if version == "broken" and history.upper_case:
            lines.append("    (transcripts in capitals)")
        lines += ["", f"{run['parameters'] / 1e6:.2f} M parameters. {course(curves[version])}", ""]
        if run["error"]:
            lines += [f"The run ended with `{_cell(run['error'])}`.", ""]
        if run["anatomy"]:
            lines += anatomy(run["anatomy"])
        lines += table(curves[version]) + predictions(run) + doctor(run, history)
    lines += ["![loss of both](curves.png)", ""]
    path = out / "history.md"
    path.write_text("\n".join(lines))
    return path


def keep(out: Path, to: Path) -> None:
    """Copies what is small and names no folder of this machine: history.md, curves.png and the curves."""
    to.mkdir(parents=True, exist_ok=True)
    for path in sorted(out.iterdir()):
        if path.suffix in (".md", ".png", ".csv"):
            (to / path.name).write_bytes(path.read_bytes())


def read(path: Path) -> list[dict[str, float]]:
    """Rows of a curve.csv; cells that were not measured are left out, NaN stays NaN."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: float(cell) for key, cell in row.items() if cell not in ("", None)} for row in rows]


def course(rows: list[dict]) -> str:
    """One sentence on the loss."""
    trained = [row for row in rows if "loss_per_char" in row]
    if not trained:
        return "No step was recorded."
    lost = next((row for row in trained if not math.isfinite(row["loss_per_char"])), None)
    finite = [row for row in trained if math.isfinite(row["loss_per_char"])]
    text = ""
    if finite:
        text = (f"Loss {finite[0]['loss_per_char']:.2f} nats a character at step {finite[0]['step']:.0f}, "
                f"{finite[-1]['loss_per_char']:.2f} at step {finite[-1]['step']:.0f}")
    if lost is not None:
        text += f"{'; ' if text else ''}not finite from step {lost['step']:.0f} on"
    measured = [row for row in rows if "val_cer" in row]
    if measured:
        last = measured[-1]
        text += f"; CER {100 * last['val_cer']:.0f} %, WER {100 * last['val_wer']:.0f} %, "
        text += f"{100 * last['val_blank_rate']:.0f} % blanks on its dev utterances at the end"
    return text + "."


def anatomy(found: dict) -> list[str]:
    """The first step that was not finite, taken apart."""
    log_probs = "all finite" if found["log_probs_finite"] else "already not finite"
    limit = f"a gradient-norm limit of {found['clip']:g}" if found.get("clip") else "no gradient-norm limit at work"
    lines = [
        f"The first step that was not finite, {found['step']} (counted from 0), with zero_infinity=True and {limit}:",
        "",
        "| where | what |", "| --- | --- |",
        f"| log-probs, before the loss | {log_probs} |",
        f"| loss, zero_infinity on | {found['loss']} |",
        f"| gradient norm | {found['grad_norm']} |",
        f"| parameters whose gradient is broken | {found['gradients_broken']} of {found['gradients']} |",
    ]
    if "gradients_broken_after_clipping" in found:
        clipped = found["gradients_broken_after_clipping"]
        lines.append(f"| the same after clipping | {clipped} of {found['gradients']} |")
    if "parameters_broken" in found:
        lines.append(f"| parameters broken after the step | {found['parameters_broken']} of {found['parameters']} |")
    return [*lines, ""]


def table(rows: list[dict]) -> list[str]:
    trained = [row for row in rows if "loss_per_char" in row]
    every = max(math.ceil(len(trained) / ROWS), 1)
    lines = ["| step | loss, nats a character | blank | learning rate | gradient norm |",
             "| --- | --- | --- | --- | --- |"]
    for row in [*trained[::every], *([trained[-1]] if trained and (len(trained) - 1) % every else [])]:
        lines.append(f"| {row['step']:.0f} | {row['loss_per_char']:.3f} | {100 * row['blank_rate']:.0f} % | "
                     f"{row['learning_rate']:.3g} | {row['grad_norm']:.3g} |")
    return [*lines, ""]


def predictions(run: dict) -> list[str]:
    """Examples, and how often which letter is predicted."""
    if not run["examples"]:
        return []
    lines = ["Predictions after the last step:", ""]
    for reference, hypothesis in run["examples"]:
        lines += [f"    reference   {reference}", f"    hypothesis  {hypothesis}"]
    total = sum(run["letters"].values())
    if total:
        frequent = list(run["letters"].items())[:4]
        most = ", ".join(f"{letter!r} {100 * count / total:.0f} %" for letter, count in frequent)
        lines += ["", f"Of {total} predicted characters: {most}."]
    else:
        lines += ["", "Nothing but blanks is predicted."]
    return [*lines, ""]


def doctor(run: dict, history: History) -> list[str]:
    """The doctor's first finding by stage."""
    lines = ["| doctor | first finding | how sure | what it says |", "| --- | --- | --- | --- |"]
    for stage, told in run["doctor"].items():
        first = told["findings"][0] if told["findings"] else None
        if first is None:
            lines.append(f"| {stage} | none |  | {told['verdict']} |")
            continue
        named = "" if run["version"] == "fixed" else (
            " (the cause)" if first["id"] in history.causes else " (not the cause)")
        others = [f["id"] for f in told["findings"][1:4]]
        lines.append(f"| {stage} | `{first['id']}`{named}, {first['weight']} | {first['confidence']:.2f} | "
                     f"{_cell(first['symptom'])}{' Then: ' + ', '.join(others) + '.' if others else ''} |")
    return [*lines, ""]


def _cell(text: str) -> str:
    """On one line, and without the folders of this machine."""
    return re.sub(r"(?<!\w)/[\w.@+/-]+/", "", " ".join(text.split())).replace("|", "/")


def draw(history: History, curves: dict[str, list[dict]], out: Path) -> None:
    """Loss and gradient norm of the versions over steps; where a loss is not finite stands a cross."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.2))
    for at, (version, rows) in enumerate(curves.items()):
        trained = [row for row in rows if "loss_per_char" in row]
        for axis, column in zip(axes, ("loss_per_char", "grad_norm")):
            points = [(row["step"], row[column]) for row in trained if math.isfinite(row[column])]
            if points:
                axis.plot(*zip(*points), color=COLOURS[version], linewidth=1.4, label=TITLES[version].lower())
        lost = next((row["step"] for row in trained if not math.isfinite(row["loss_per_char"])), None)
        if lost is not None:
            axes[0].plot([lost], [LETTER_FREQUENCY_LOSS], "x", color=COLOURS[version], markersize=9,
                         label="not finite from here")
    axes[0].axhline(LETTER_FREQUENCY_LOSS, color="grey", linewidth=0.8, linestyle=":")
    axes[0].set_title("loss, nats a character (dotted: letter frequencies only)", loc="left", fontsize=9)
    axes[0].set_ylim(0, 6)
    axes[1].set_title("gradient norm before clipping", loc="left", fontsize=9)
    axes[1].set_yscale("log")
    for axis in axes:
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    plt.close(figure)
