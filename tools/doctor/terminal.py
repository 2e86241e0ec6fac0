"""The report for a terminal: verdict first, then findings by weight, then what was and what was not examined."""

from __future__ import annotations

import os
import textwrap
from typing import Any

from tools.doctor.finding import Finding, Report

HEADS = {"prevents": "PREVENTS LEARNING", "warning": "WARNING", "note": "NOTE"}
_COLOURS = {"prevents": "31", "warning": "33", "note": "36"}


def render(report: Report, width: int = 110, colour: bool = False, notes: bool = True) -> str:
    """The whole report as text; `colour` uses ANSI colours, `notes` False leaves out findings of weight note."""
    lines = [paint(report.verdict, "31" if report.exit_code else "32", colour), ""]
    for finding in report.findings:
        if notes or finding.weight != "note":
            lines += [*render_finding(finding, width, colour), ""]
    if report.ruled_out:
        lines += _wrap("Ruled out: ", ", ".join(report.ruled_out), width)
    for line in report.not_examined:
        lines += _wrap("Not examined: ", line, width)
    if report.examined:
        lines += _wrap("Examined: ", "; ".join(report.examined), width)
    return "\n".join(lines).rstrip() + "\n"


def render_finding(finding: Finding, width: int = 110, colour: bool = False) -> list[str]:
    """The lines of one finding."""
    head = f"{HEADS[finding.weight]}  {finding.id}"
    where = f"  [{finding.where}]" if finding.where else ""
    lines = [paint(head, _COLOURS[finding.weight], colour) + f"  ({finding.certainty}, "
                                                             f"{finding.confidence:.0%}){where}"]
    lines += _wrap("  symptom   ", finding.symptom, width)
    lines += _wrap("  cause     ", finding.cause, width)
    for name, value in finding.evidence.items():
        lines += _wrap("  evidence  ", f"{name}: {show_value(value)}", width)
    for change in finding.fix:
        lines += _wrap("  change    ", change, width)
    return [*lines, f"  more      {os.path.relpath(finding.page) if finding.page.is_file() else finding.page.name}"]


def show_value(value: Any, items: int = 8) -> str:
    """A piece of evidence on one line."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        shown = [f"{key} {show_value(item)}" for key, item in list(value.items())[:items]]
        return ", ".join(shown) + (f", ... {len(value) - items} more" if len(value) > items else "")
    if isinstance(value, (list, tuple)):
        shown = [show_value(item) for item in list(value)[:items]]
        return ", ".join(shown) + (f", ... {len(value) - items} more" if len(value) > items else "")
    return str(value)


def paint(text: str, code: str, colour: bool) -> str:
    return f"\033[1;{code}m{text}\033[0m" if colour else text


def _wrap(head: str, text: str, width: int) -> list[str]:
    """`text` under a head, wrapped and indented; nothing but spaces is dropped."""
    lines = textwrap.wrap(text, max(width - len(head), 40), break_long_words=False, break_on_hyphens=False) or [""]
    return [head + lines[0], *(" " * len(head) + line for line in lines[1:])]
