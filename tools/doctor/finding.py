"""What the doctor says: a finding, the plots behind it, and the report that holds them all. Standard library only."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# From what stops learning to what is good to know; findings are sorted in this order.
WEIGHTS = ("prevents", "warning", "note")
PAGES = Path(__file__).resolve().parent / "pages"


@dataclass
class Plot:
    """Lines to draw: `series` is name -> (x values, y values), of equal length, None or NaN for a gap."""

    title: str
    x_label: str
    y_label: str
    series: dict[str, tuple[list[float], list[float]]]
    note: str = ""


@dataclass
class Finding:
    """One fault, named by its cause.

    Args:
        id: of the fault, the name of its page (`tools/doctor/pages/<id>.md`).
        weight: "prevents" (learning), "warning" or "note".
        symptom: what was seen, one sentence, with its numbers.
        cause: why that happens, one or two sentences.
        evidence: name -> number, text or list: what was measured.
        fix: the exact changes to make, each a Hydra override or a line of code, the best first.
        confidence: 0 to 1, how sure the cause is.
        where: file and line, module or configuration key.
        plots: to be drawn in the HTML report.
        unreadable: an input could not be opened at all, so that nothing was examined (exit code 2).

    Raises ValueError for a weight or a confidence that there is not.
    """

    id: str
    weight: str
    symptom: str
    cause: str
    evidence: dict[str, Any]
    fix: list[str]
    confidence: float
    where: str = ""
    plots: list[Plot] = field(default_factory=list)
    unreadable: bool = False

    def __post_init__(self):
        if self.weight not in WEIGHTS:
            raise ValueError(f"finding {self.id}: weight {self.weight!r}: must be one of {', '.join(WEIGHTS)}")
        if not 0.0 <= self.confidence <= 1.0:
            raise ValueError(f"finding {self.id}: confidence {self.confidence!r}: must be from 0 to 1")

    @property
    def page(self) -> Path:
        """The explanation's file."""
        return PAGES / f"{self.id}.md"

    @property
    def certainty(self) -> str:
        """The confidence in a word."""
        steps = ((0.9, "sure"), (0.7, "very likely"), (0.4, "likely"), (0.0, "possible"))
        return next(word for least, word in steps if self.confidence >= least)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what is not finite becomes a string."""
        return {**plain(asdict(self)), "page": f"tools/doctor/pages/{self.id}.md"}


@dataclass
class Report:
    """All findings, and what they do not cover: `examined` and `ruled_out` and `not_examined` are lines of text.

    `ruled_out` holds fault ids, `examined` what was looked at, `not_examined` "what: why not".
    """

    findings: list[Finding] = field(default_factory=list)
    examined: list[str] = field(default_factory=list)
    ruled_out: list[str] = field(default_factory=list)
    not_examined: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.sort()

    def sort(self) -> None:
        """By weight, then by how sure; findings alike keep their order, which is that of causes before effects."""
        self.findings.sort(key=lambda finding: (WEIGHTS.index(finding.weight), -round(finding.confidence, 1)))

    def add(self, *findings: Finding) -> None:
        """Takes more findings and keeps the order."""
        self.findings.extend(findings)
        self.sort()

    def of_weight(self, weight: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.weight == weight]

    @property
    def ids(self) -> list[str]:
        """Fault ids in order of rank, each once."""
        return list(dict.fromkeys(finding.id for finding in self.findings))

    @property
    def exit_code(self) -> int:
        """0 healthy, 1 findings that prevent learning, 2 could not examine."""
        stops = self.of_weight("prevents")
        if any(not finding.unreadable for finding in stops):
            return 1
        return 2 if stops or not (self.examined or self.findings) else 0

    @property
    def verdict(self) -> str:
        """One line, first of every output."""
        stops, warnings = self.of_weight("prevents"), self.of_weight("warning")
        if self.exit_code == 2:
            why = stops[0].symptom if stops else next(iter(self.not_examined), "no input")
            more = len(self.not_examined) - 1 if not stops else 0
            return f"Could not examine: {why}" + (f"; and {more} more" if more > 0 else "")
        warned = f"{len(warnings)} warning{'s' * (len(warnings) != 1)}" if warnings else "no warnings"
        if not stops:
            return f"Nothing found that prevents learning; {warned}."
        more = f", and {len(stops) - 1} more" if len(stops) > 1 else ""
        return f"This will not learn: {stops[0].id}{more}; {warned}."

    def to_dict(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "exit_code": self.exit_code,
            "findings": [finding.to_dict() for finding in self.findings],
            "examined": list(self.examined),
            "ruled_out": list(self.ruled_out),
            "not_examined": list(self.not_examined),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=True, allow_nan=False)

    def save(self, path: str | Path) -> None:
        """Writes the JSON, whole or not at all; makes the folder."""
        from manifests.schema import write_atomic

        write_atomic(path, f"{self.to_json()}\n".encode())

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """The report of a saved JSON."""
        findings = []
        for entry in data["findings"]:
            entry = {key: value for key, value in entry.items() if key != "page"}
            entry["plots"] = [
                Plot(**{**plot, "series": {name: tuple(xy) for name, xy in plot["series"].items()}})
                for plot in entry.get("plots", [])
            ]
            findings.append(Finding(**entry))
        return cls(findings, data["examined"], data["ruled_out"], data["not_examined"])


def plain(value: Any) -> Any:
    """`value` in what JSON holds: numbers of numpy and torch become Python's, NaN and infinities their names."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in (sorted(value, key=str) if isinstance(value, (set, frozenset)) else value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)
