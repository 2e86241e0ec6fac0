"""The training curve of a run as a picture: loss, error rates, blank rate and learning rate over steps."""

from __future__ import annotations

import csv
from pathlib import Path

# Nats a character of English predicted by letter frequencies alone: a run that stays here has learned no speech.
LETTER_FREQUENCY_LOSS = 2.85


def read_curve(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Column to its (step, value) pairs; cells that were not measured at a step are left out.

    Raises ValueError naming file and line where a cell is not a number.
    """
    columns: dict[str, list[tuple[float, float]]] = {}
    with open(path, newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            for name, cell in row.items():
                if name != "step" and cell not in ("", None):
                    try:
                        columns.setdefault(name, []).append((float(row["step"]), float(cell)))
                    except ValueError:
                        raise ValueError(f"{path}:{number}: {name} is {cell!r}, not a number") from None
    return columns


def draw(runs: dict[str, Path], out: Path, unit: str = "character") -> None:
    """Writes a PNG with the curves of one or several runs, given as name to the run's curve.csv; losses a `unit`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                         "grid.alpha": 0.25, "figure.facecolor": "white"})
    figure, axes = plt.subplots(2, 2, figsize=(9.5, 6), sharex=True)
    colours = plt.get_cmap("tab10").colors
    panels = [
        (axes[0, 0], f"loss, nats a {unit}", [("loss_per_char", "train", "-"), ("val_loss", "validation", "--")]),
        (axes[0, 1], "validation error rate, %", [("val_wer", "WER", "-"), ("val_cer", "CER", "--")]),
        (axes[1, 0], "frames whose best symbol is blank, %",
         [("blank_rate", "train", "-"), ("val_blank_rate", "validation", "--")]),
        (axes[1, 1], "learning rate", [("learning_rate", "", "-")]),
    ]
    for at, (name, path) in enumerate(runs.items()):
        columns = read_curve(path)
        for axis, title, lines in panels:
            scale = 100 if "%" in title else 1
            for column, label, style in lines:
                points = columns.get(column, [])
                if points:
                    steps, values = zip(*points)
                    text = " ".join(part for part in ((name if len(runs) > 1 else ""), label) if part)
                    marker = "o" if len(points) < 25 and column.startswith("val") else None
                    axis.plot(steps, [value * scale for value in values], style, color=colours[at], label=text or None,
                              linewidth=1.4, marker=marker, markersize=3)
            axis.set_title(title, loc="left", fontsize=9)
    if unit == "character":
        mark_letter_frequencies(axes[0, 0])
    axes[0, 0].set_ylim(bottom=0, top=6)
    for axis in (axes[0, 1], axes[1, 0]):
        axis.set_ylim(0, 105)
    for axis in axes[1]:
        axis.set_xlabel("step")
    for axis in axes.flat[:3]:
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False, fontsize=8)
    save_picture(figure, out)


def mark_letter_frequencies(axis) -> None:
    """A dotted line where a character model stays that has learned no speech."""
    axis.axhline(LETTER_FREQUENCY_LOSS, color="grey", linewidth=0.8, linestyle=":")
    axis.text(0.99, LETTER_FREQUENCY_LOSS, "letter frequencies only", transform=axis.get_yaxis_transform(),
              ha="right", va="bottom", color="grey", fontsize=8)


def save_picture(figure, out: Path) -> None:
    """Writes a figure of pyplot as PNG, whole or not at all, and closes it."""
    import matplotlib.pyplot as plt

    figure.tight_layout()
    part = out.with_name(f".part-{out.name}")
    figure.savefig(part, dpi=130, format="png")
    plt.close(figure)
    part.replace(out)
