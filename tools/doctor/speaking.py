"""What the callback says while it watches: in the log, on one device or several, and after which it asks the model."""

from __future__ import annotations

import logging

from tools.doctor.bands import COLUMNS
from tools.doctor.devices import FROM_ANOTHER
from tools.doctor.finding import Finding, Report
from tools.doctor.saved import NON_FINITE

log = logging.getLogger("doctor")

OWN = (*NON_FINITE, "infinite-loss-hidden")  # of the batches of one device; the rest all devices see alike


def announce(trainer, report: Report, told: set) -> bool:
    """Says what is new, once, and adds it to `told`; whether any of it prevents learning."""
    new = [f for f in report.findings if f.weight != "note" and (f.id, f.weight) not in told]
    for finding in new:
        told.add((finding.id, finding.weight))
        _speak(trainer, finding)
    return any(finding.weight == "prevents" for finding in new)


def _speak(trainer, finding: Finding) -> None:
    """One line of the log; of what all devices see alike only by the first."""
    if not trainer.is_global_zero and (finding.id not in OWN or FROM_ANOTHER in finding.evidence):
        return
    device = f"device {trainer.global_rank}: " if trainer.world_size > 1 else ""
    log.warning("doctor: %sstep %d: %s: %s Change: %s", device, trainer.global_step, finding.id, finding.symptom,
                finding.fix[0] if finding.fix else "-")


def troubled(found: list[Finding], over: bool) -> bool:
    """Whether the run has not learned, so that its model is worth probing; a beginning counts where it is `over`.

    How it ended is no sign of that, nor is its place against the band of healthy runs, whose evidence is its columns.
    """
    told = [f for f in found if f.id.startswith("run-") and f.id != "run-ended" and not set(f.evidence) <= set(COLUMNS)]
    return any(f.weight != "note" or f.id == "run-early" and over for f in told)
