"""What the doctor says of each fault and each healthy set-up, as a table.

    python -m tests.tools.doctor.table --out table.md      # all, some minutes
    python -m tests.tools.doctor.table --open --stage before   # only those that are not held out
    python -m tests.tools.doctor.table --list                  # names, stages, which are held out; runs nothing
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.tools.doctor.faults import STAGES, Fault, Healthy, faults, healthy

ROOT = Path(__file__).resolve().parents[3]


@dataclass
class Row:
    """What came of one fault or healthy set-up."""

    item: Fault | Healthy
    findings: list = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0

    @property
    def rank(self) -> int | None:
        """Place of the first finding that names the fault, from 1; None where none does."""
        places = [i for i, finding in enumerate(self.findings, 1) if finding.id in self.item.expects]
        return places[0] if places else None

    @property
    def alarms(self) -> list[str]:
        """Ids of the findings that say that this cannot learn."""
        return [finding.id for finding in self.findings if finding.weight == "prevents"]

    @property
    def evidence(self) -> str:
        """Of the finding that names the fault, else of the first: its numbers in short."""
        if self.error:
            return self.error
        if not self.findings:
            return "no finding"
        finding = self.findings[self.rank - 1 if self.rank else 0]
        numbers = "; ".join(f"{key} {_short(value)}" for key, value in list(finding.evidence.items())[:4])
        return f"{finding.id} ({finding.weight}): {numbers or finding.symptom}"

    def line(self) -> str:
        kind = self.item.stage + (", held out" if self.item.held_out else "")
        if isinstance(self.item, Fault):
            first = self.findings[0].id if self.findings else "-"
            cells = [self.item.name, kind, " / ".join(self.item.expects[:2]), "yes" if self.rank else "no",
                     self.rank or "-", first, self.evidence]
        else:
            cells = [self.item.name, kind, ", ".join(self.alarms) or "none",
                     ", ".join(f.id for f in self.findings if f.weight == "warning") or "-", self.error or "-"]
        return "| " + " | ".join(" ".join(str(cell).split()).replace("|", "/") for cell in cells) + " |"


def _short(value) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def judge(item: Fault | Healthy, folder: Path) -> Row:
    """Makes one and asks the doctor. Whatever goes wrong in the doctor is the row's error."""
    import pytest

    row = Row(item)
    begin = time.perf_counter()
    try:
        made = item.make(Path(folder))
        begin = time.perf_counter()  # what the doctor takes, but for a training that it watches
        if item.stage == "during":
            report = made
        else:
            from tools.doctor import examine

            report = examine(**made)
        row.findings = list(report.findings)
    except pytest.skip.Exception:
        raise
    except Exception as error:
        row.error = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    row.seconds = time.perf_counter() - begin
    return row


def rates(rows: list[Row]) -> list[str]:
    """Lines that sum the table up, all, open and held out."""
    lines = []
    for name, chosen in (("all", rows), ("open", [r for r in rows if not r.item.held_out]),
                         ("held out", [r for r in rows if r.item.held_out])):
        wrong = [r for r in chosen if isinstance(r.item, Fault)]
        sane = [r for r in chosen if isinstance(r.item, Healthy)]
        parts = []
        if wrong:
            named, first = sum(r.rank is not None for r in wrong), sum(r.rank == 1 for r in wrong)
            parts.append(f"{named} of {len(wrong)} faults named ({named / len(wrong):.0%}), "
                         f"{first} of them first ({first / len(wrong):.0%} of all)")
        if sane:
            false = sum(bool(r.alarms) for r in sane)
            broken = sum(bool(r.error) for r in sane)
            parts.append(f"{false} of {len(sane)} healthy set-ups with a false alarm, {broken} not examined")
        if parts:
            lines.append(f"{name}: {'; '.join(parts)}")
    for stage in STAGES:
        wrong = [r for r in rows if isinstance(r.item, Fault) and r.item.stage == stage]
        if wrong:
            lines.append(f"{stage}: {sum(r.rank is not None for r in wrong)} of {len(wrong)} named, "
                         f"{sum(r.rank == 1 for r in wrong)} first")
    return lines


def markdown(rows: list[Row], chosen: int, held_out: bool) -> str:
    """The table of the rows that are held out, or of the others, with the rates of all; `chosen` is how many were to be run."""
    rows = sorted(rows, key=lambda row: row.item.name)
    shown = [row for row in rows if row.item.held_out == held_out]
    wrong = [row.line() for row in shown if isinstance(row.item, Fault)]
    sane = [row.line() for row in shown if isinstance(row.item, Healthy)]
    head = [f"`python -m tests.tools.doctor.table`, commit {commit()}, Python {platform.python_version()}, CPU.", ""]
    if len(rows) < chosen:
        head += [f"Cut short: {len(rows)} of {chosen} were run, in an order drawn by a hash of their names.", ""]
    head += [f"- {line}" for line in rates(rows)]
    if wrong:
        head += ["", "| fault | stage | expected | named | rank | first finding | evidence |", "|---" * 7 + "|", *wrong]
    if sane:
        head += ["", "| healthy set-up | stage | cannot learn, it says | warnings | error |", "|---" * 5 + "|", *sane]
    return "\n".join(head) + "\n"


def commit() -> str:
    """The commit examined; says where files of the doctor differ from it."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    return (git("rev-parse", "--short", "HEAD") or "unknown") + (
        " with changes in tools/doctor" if git("status", "--porcelain", "tools/doctor") else ""
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.tools.doctor.table", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="faults or healthy set-ups; all where none is given")
    parser.add_argument("--open", action="store_true", help="leave out those that are held out")
    parser.add_argument("--stage", choices=STAGES)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--out", type=Path, help="markdown to write; rows that are held out go into NAME_held_out.md, for the "
                                                 "doctor's authors to leave unread")
    args = parser.parse_args()
    from recipes.threads import set_threads

    set_threads()
    chosen = [
        item for item in (*faults(), *healthy())
        if (not args.names or item.name in args.names) and not (args.open and item.held_out)
        and args.stage in (None, item.stage)
    ]
    if args.list:
        for item in chosen:
            half = "held out" if item.held_out else "open"
            print(f"{type(item).__name__.lower():8} {item.stage:7} {half:9} {item.name}")
        return 0
    import pytest

    rows = []
    # Wherever it is cut short, what was run is a fair sample.
    for item in sorted(chosen, key=lambda item: hashlib.sha1(f"order {item.name}".encode()).hexdigest()):
        with tempfile.TemporaryDirectory() as folder:
            try:
                row = judge(item, Path(folder))
            except pytest.skip.Exception as reason:
                print(f"{item.name}: skipped, {reason}", flush=True)
                continue
        rows.append(row)
        print(f"{row.line()} {row.seconds:.0f} s", flush=True)
        if args.out:  # what is known so far stays, whatever ends the command
            args.out.write_text(markdown(rows, len(chosen), held_out=False))
            if any(row.item.held_out for row in rows):
                args.out.with_stem(f"{args.out.stem}_held_out").write_text(markdown(rows, len(chosen), held_out=True))
    print("\n".join(rates(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
