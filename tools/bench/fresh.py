"""Fresh: where the seconds of a whole ./run.sh go, stage by stage, from its saved log.

    ./run.sh 2>&1 | tee run.log
    python -m tools.bench fresh run.log --note "fresh clone, two idle cores"

Nothing is run: the figures are those that each stage says at its end (`== stage 4: done in 580 s`). The machine that is
named beside them is the one that this is called on, so call it where the log was made, at the same commit; --device
names a GPU that trained.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from manifests.report import table
from recipes.threads import usable_cores
from tools.bench._common import BenchError, describe, guarded, parser, save

STAGE = re.compile(r"== stage (\d+): ([^:]+): (.*)")
DONE = re.compile(r"== stage (\d+): done in (\d+) s")
# What the training says of itself, without its folder: what was trained, and how long its steps alone took.
TRAINED = re.compile(r"(\S+ on \S+: [\d.]+ M parameters, .*), outputs in .*|(Trained \d+ steps in .*)")


class Stage(NamedTuple):
    """One stage of run.sh; `seconds` is None where it was skipped as complete."""

    number: int
    title: str
    seconds: int | None


def read_log(text: str) -> list[Stage]:
    """The stages of one ./run.sh in their order.

    Raises BenchError for a log without a stage, with one that was not done, or of several runs.
    """
    begun: dict[int, str] = {}
    stages: dict[int, Stage] = {}
    for line in text.splitlines():
        if found := DONE.fullmatch(line):
            number = int(found[1])
            stages[number] = Stage(number, begun.get(number, ""), int(found[2]))
        elif found := STAGE.fullmatch(line):
            number = int(found[1])
            if number in begun:
                raise BenchError(f"stage {number} ({found[2]}) stands there twice: give the log of one run alone")
            begun[number] = found[2]
            if found[3].startswith("complete, skipped"):
                stages[number] = Stage(number, found[2], None)
    if not begun:
        raise BenchError("no line '== stage N: ...': give what ./run.sh has printed")
    for number, title in begun.items():
        if number not in stages:
            raise BenchError(f"stage {number} ({title}) was not done: it failed or was cut, its seconds are unknown")
    return list(stages.values())


def rows_of(stages: Sequence[Stage]) -> list[list[str]]:
    """Rows of number, title, seconds and share of the whole, the sum in the last."""
    total = sum(stage.seconds or 0 for stage in stages)
    rows = [
        [str(stage.number), stage.title, "skipped", ""] if stage.seconds is None
        else [str(stage.number), stage.title, str(stage.seconds), f"{100 * stage.seconds / max(total, 1):.0f}"]
        for stage in stages
    ]
    return [*rows, ["", "all", str(total), "100"]]


def main(argv: Sequence[str] | None = None) -> int:
    options = parser("fresh", __doc__)
    options.add_argument("log", type=Path, help="what ./run.sh has printed")
    options.add_argument("--device", metavar="NAME", default="CPU", help="what trained (default %(default)s)")
    argv = list(sys.argv[1:] if argv is None else argv)
    args = options.parse_args(argv)
    return guarded("fresh", lambda: _run(args, argv))


def _run(args, argv) -> None:
    try:
        text = args.log.read_text(errors="replace")
    except OSError as error:
        raise BenchError(f"{args.log}: {error.strerror}: give the file that ./run.sh was saved to") from None
    try:
        stages = read_log(text)
    except BenchError as error:
        raise BenchError(f"{args.log}: {error}") from None
    head, rows = ["stage", "", "seconds", "% of all"], rows_of(stages)
    remarks = [found[1] or found[2] for line in text.splitlines() if (found := TRAINED.fullmatch(line))]
    if any(line.startswith("== environment: ") for line in text.splitlines()):
        remarks.append("The environment was made too; the log does not say how long that took.")
    print("\n".join([table(head, rows, left=(0, 1)), *remarks]))
    save(args.json, "fresh", __doc__, argv, describe(args.device, usable_cores()), head, rows, args.note,
         stages=[stage._asdict() for stage in stages], remarks=remarks)


if __name__ == "__main__":
    sys.exit(main())
