"""The reports that the callback leaves in a run's folder: that of rank 0, and those of ranks that ended without it.
Standard library only."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

from tools.doctor import devices
from tools.doctor.finding import Finding, Report

CURVE = "run: the curve, by the callback"
PASSED = "seen until step"  # in the evidence of what a run may have left behind since
NON_FINITE = ("run-nan", "explodes", "features-bad", "precision-overflow", "data-target-too-long", "loss-wrong")
# What is read from the curve, and may be another a thousand steps later; what was found in the set-up stays.
PASSING = (*NON_FINITE, "clip-missing", "lr-zero", "lr-too-low", "lr-too-high", "warmup-too-long", "run-plateau",
           "run-collapse-blank", "run-collapse-letter", "run-diverged", "run-overfitting", "run-ended", "data-slow")


def head(step: int) -> str:
    """The line of a report, among what was examined, that says how far it reaches."""
    return f"{CURVE}, to step {step}"


def reaches(report: Report) -> int | None:
    """The step to which a report reaches; None for one of an older version."""
    found = next((m for line in report.examined if (m := re.fullmatch(rf"{CURVE}, to step (\d+)", line))), None)
    return int(found[1]) if found else None


def reports(folder: Path) -> dict[int, tuple[Path, Report | None]]:
    """Rank -> (path, report) of those in a run's folder; None in place of one that cannot be read."""
    found = {}
    for path in (Path(folder) / "doctor").glob("report*.json"):
        if match := re.fullmatch(r"report(?:-rank(\d{1,5}))?", path.stem):
            try:
                report = Report.from_dict(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                report = None
            found[int(match[1] or 0)] = (path, report)
    return dict(sorted(found.items()))


def readable(folder: Path) -> bool:
    """Whether there is a report."""
    return any(report is not None for _, report in reports(folder).values())


def findings(folder: Path, last_step: int) -> list[Finding]:
    """What these reports say, each fault once. A curve that went on to `last_step` for long may have left it behind:
    then it is a note."""
    told = {rank: [_dated(finding, reaches(report), last_step) for finding in report.findings]
            for rank, (_, report) in reports(folder).items() if report is not None}
    every = [{"findings": Report(told.get(rank, [])).to_dict()["findings"]} for rank in range(max(told, default=0) + 1)]
    return devices.joined(told.get(0, []), every, 0)


def passed(finding: Finding) -> bool:
    """Whether a finding is of a step long before the last."""
    return PASSED in finding.evidence


def _dated(finding: Finding, step: int | None, last_step: int) -> Finding:
    if step is None or step >= 0.9 * last_step or finding.id not in PASSING:
        return finding
    return replace(finding, weight="note", evidence={PASSED: step, **finding.evidence},
                   symptom=f"{finding.symptom} This was seen at step {step}; the run went on to step {last_step}.")
