"""Causes before effects: a fault shows in many properties at once, and only the first of them is to be mended."""

from __future__ import annotations

from dataclasses import replace

from tools.doctor.finding import Finding

# cause -> what else it makes look wrong. Where both are found, the effect becomes a note that names its cause.
EFFECTS: dict[str, tuple[str, ...]] = {}


def name_causes(findings: list[Finding]) -> list[Finding]:
    """Findings with the effects of other findings turned into notes, causes first; order is kept otherwise."""
    stopping = {finding.id for finding in findings if finding.weight == "prevents"}
    out = []
    for finding in findings:
        causes = [cause for cause in stopping if cause != finding.id and finding.id in EFFECTS.get(cause, ())]
        if causes and finding.weight != "note":
            symptom = f"{finding.symptom} This follows from {', '.join(sorted(causes))}: mend that first."
            finding = replace(finding, weight="note", symptom=symptom)
        out.append(finding)
    return out
