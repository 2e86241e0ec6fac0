"""RESULTS.md from the published results: `python -m tools.report.results`.

Each `recipes/*/results/*.json` that `python -m tools.report --publish` left there is one run; the curve beside it gives
its steps and its time. Nothing in the table is written by hand; the text of `HEAD` says how it was measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from manifests.schema import write_atomic
from tools.report.curve import read_curve
from tools.report.seeds import spread_table

ROOT = Path(__file__).resolve().parents[2]
HEAD = """# Results

Greedy CTC decoding, no language model. WER and CER are summed over the corpus, with the same normalisation of references
and hypotheses (lower case, one kind of apostrophe, white space collapsed); in brackets the 95 % interval, by bootstrap
over utterances. Time is that of training alone. A run's curve is behind its recipe's name: step, seconds, loss, error rates,
blank rate, learning rate, gradient norm, throughput. Made by `python -m tools.report.results`.
"""
SPEED = """## Speed

Train steps, loaders, batches, manifests and evaluation against the parts that a user would take instead, in pairs, with hardware,
commands and commits: [tools/bench/results/README.md](tools/bench/results/README.md).
"""


def runs(root: Path) -> list[tuple[str, str, Path, dict]]:
    """(corpus, recipe, file, what it holds) of every published run, by corpus and recipe."""
    found = []
    for path in sorted(root.glob("recipes/*/results/*.json")):
        held = json.loads(path.read_text())
        found.append((held["corpus"], held["recipe"], path, held))
    return sorted(found, key=lambda run: run[:3])


def rate(part: dict) -> str:
    low, high = part["wer_interval"] or (float("nan"), float("nan"))
    return f"{100 * part['wer']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def section(corpus: str, of_corpus: list[tuple[str, str, Path, dict]], root: Path) -> list[str]:
    """A heading and two tables: what was reached, and what it took."""
    reached = ["| recipe | test set | utterances | WER % | CER % |", "|---|---|---:|---:|---:|"]
    took = [
        "| recipe | parameters | steps | training | hardware | command | commit |", "|---|---:|---:|---:|---|---|---|"
    ]
    for _, recipe, path, held in of_corpus:
        curve = path.with_suffix(".csv")
        link = f"[{recipe}]({path.with_suffix('.png').relative_to(root).as_posix()})"
        parts = held["manifests"]
        for part in [*parts, {**held["overall"], "name": "all"}] if len(parts) > 1 else parts:
            reached.append(
                f"| {link} | {part['name']} | {part['utterances']} | {rate(part)} | {100 * part['cer']:.1f} |"
            )
        columns = read_curve(curve)
        step, seconds = columns["seconds"][-1]
        took.append(
            f"| [{recipe}]({curve.relative_to(root).as_posix()}) | {held['parameters'] / 1e6:.1f} M | {step:.0f} | "
            f"{seconds / 60:.1f} min | {held['hardware']} | `{held['command']}` | {held['commit']} |"
        )
    return [f"## {corpus}", "", *reached, "", *took, ""]


def seeds(root: Path) -> list[str]:
    """A heading and a table of every recipe that was trained with several seeds (`python -m tools.report.seeds`)."""
    lines = []
    for path in sorted(root.glob("recipes/*/results/seeds/*.json")):
        held = json.loads(path.read_text())
        commits = ", ".join(sorted({run["commit"] for run in held["runs"]}))
        curves = path.with_suffix(".png").relative_to(root).as_posix()
        lines += [
            f"[{held['recipe']}]({curves}) on {held['corpus']}, `{held['command']}`, {held['hardware']}, commit {commits}:",
            "", *spread_table(held), "",
        ]
    return ["## From seed to seed", "", *lines] if lines else []


def page(root: Path = ROOT) -> str:
    """The text of RESULTS.md. Raises OSError, ValueError or KeyError where a published run is not whole."""
    found = runs(root)
    lines = [HEAD]
    for corpus in sorted({run[0] for run in found}):
        lines += section(corpus, [run for run in found if run[0] == corpus], root)
    return "\n".join([*lines, *seeds(root), SPEED])


def main() -> int:
    try:
        write_atomic(ROOT / "RESULTS.md", page().encode())
    except (OSError, ValueError, KeyError) as error:
        print(f"results: {error}", file=sys.stderr)
        return 1
    print(ROOT / "RESULTS.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
