"""What a ladder leaves: ladder.json, ladder.md with the table, ladder.png with the curves of all rungs."""

from __future__ import annotations

import json
from pathlib import Path

from manifests.schema import write_atomic
from tools.report.__main__ import commit, hardware
from tools.report.curve import mark_letter_frequencies, read_curve, save_picture


def write(out: Path, about: dict, results: list[dict]) -> None:
    """All three files for the rungs climbed so far, `results` as of rung.json, lowest first. Raises OSError."""
    told = [{key: value for key, value in result.items() if key != "asked"} for result in results]
    whole = {**about, "commit": commit(), "hardware": hardware(), "rungs": told}
    write_atomic(out / "ladder.json", (json.dumps(whole, indent=1, ensure_ascii=False) + "\n").encode())
    write_atomic(out / "ladder.md", ("\n".join(markdown(whole)) + "\n").encode())
    curves = {result["rung"]: out / result["rung"] / "curve.csv" for result in results}
    draw({name: path for name, path in curves.items() if path.is_file()}, out / "ladder.png", about["unit"])


def markdown(ladder: dict) -> list[str]:
    """Lines of ladder.md: the table, and in words what the last rung says."""
    lines = [
        f"# The ladder of {ladder['recipe']} on {ladder['corpus']}",
        "",
        f"`{ladder['command']}`, commit {ladder['commit']}, {ladder['hardware']}. Steps and minutes are those to the "
        "target, and of the whole run where it was not reached; train is what the rung trains on (64 utterances of "
        "it), in evaluation mode.",
        "",
        "| rung | utterances | hours | steps | minutes | target CER % | train CER % | dev CER % | dev WER % | verdict"
        " |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for rung in ladder["rungs"]:
        train, dev = rung["train"] or {}, rung["dev"] or {}
        cells = [
            rung["rung"], rung["utterances"] or "-", f"{rung['hours']:.2f}" if rung["hours"] else "-",
            "-" if rung["steps"] is None else rung["steps"],
            "-" if rung["minutes"] is None else f"{rung['minutes']:.1f}",
            f"{100 * rung['target']:g}{' (dev)' if rung['rung'] == 'all' else ''}",
            percent(train.get("cer")), percent(dev.get("cer")), percent(dev.get("wer")),
            "learned" if rung["passed"] else "failed",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    last = ladder["rungs"][-1]
    lines += ["", f"Rung {last['rung']}: {last['verdict']}." if last["passed"] else f"{last['verdict']}.", "",
              "![Loss of the rungs](ladder.png)"]
    return lines


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def draw(curves: dict[str, Path], out: Path, unit: str = "character") -> None:
    """A PNG of the losses of all rungs over steps on a log axis, given as rung to its curve.csv; none makes no file."""
    if not curves:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
             "grid.alpha": 0.25}
    with plt.rc_context(style):
        figure, axis = plt.subplots(figsize=(8, 4.5))
        colours = plt.get_cmap("tab10").colors
        for colour, (name, path) in zip(colours, curves.items()):
            columns = read_curve(path)
            checked = "dev" if name == "all" else "train, evaluation mode"
            for column, line, what in (("loss_per_char", "-", "train"), ("val_loss", "--", checked)):
                points = columns.get(column, [])
                if points:
                    axis.plot(*zip(*points), line, color=colour, linewidth=1.4, label=f"{name}: {what}",
                              marker="o" if len(points) < 10 else None, markersize=3)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda step, _: f"{step:g}")  # 20 and not 2 x 10^1
        axis.xaxis.set_minor_formatter(lambda step, _: f"{step:g}" if f"{step:g}"[0] in "25" else "")
        axis.set_ylim(bottom=0, top=6)
        axis.set_xlabel("step")
        axis.set_title(f"loss, nats a {unit}", loc="left", fontsize=9)
        if unit == "character":
            mark_letter_frequencies(axis)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False, fontsize=8)
        save_picture(figure, out)
