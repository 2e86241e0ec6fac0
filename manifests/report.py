"""What a check of manifests found: findings with file and line, figures a file, and both as text and as JSON."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from manifests.schema import write_atomic

# Every code that a finding can have, and what it means for training. The order is that of the printed summary.
CODES: dict[str, str] = {
    "unreadable": "the manifest cannot be opened",
    "empty_manifest": "no utterance in the file",
    "bom": "byte order mark, which NeMo cannot read",
    "not_utf8": "bytes that are not UTF-8",
    "not_json": "not JSON",
    "not_object": "JSON, but not an object",
    "blank_line": "blank line, at which lhotse's loader stops",
    "missing_field": "a required field is not there",
    "wrong_type": "a field of the wrong type",
    "bad_string": "a string that UTF-8 cannot hold",
    "bad_path": "a path that can name no file",
    "bad_duration": "duration not finite or not over 0",
    "bad_offset": "offset not finite or under 0",
    "bad_sampling_rate": "sampling rate out of range",
    "missing_audio": "the audio file is not there",
    "broken_audio": "the audio cannot be read or is cut off",
    "duration_mismatch": "duration differs from the audio's",
    "rate_mismatch": "sampling_rate differs from the audio's",
    "not_mono": "more than one channel, of which loaders die",
    "other_rate": "not the recipe's sampling rate",
    "empty_text": "no text: trained as silence",
    "upper_case": "capitals that the labels lack: NeMo drops them silently",
    "outside_labels": "characters that the labels lack: NeMo drops them silently",
    "spaces": "white space at an end or doubled",
    "duplicate_audio": "the same audio twice in one manifest",
    "duplicate_id": "the same utterance id twice in one manifest",
    "shared_audio": "the same audio in two manifests",
    "shared_id": "the same utterance id in two manifests",
    "shared_text": "the same text in two manifests",
    "too_short": "under 0.1 s: few or no frames",
    "speech_rate": "characters a second far from the others: text and audio may not belong together",
    "ctc_too_long": "more CTC targets than frames: infinite loss",
}


class Finding(NamedTuple):
    """One thing found at one line (0: the whole file). `severity` is "error" or "warning", `code` a key of CODES."""

    severity: str
    code: str
    file: str
    line: int
    message: str
    value: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.severity}: {self.code}: {self.message}"


def percentiles(
    values: Sequence[float], shares: Sequence[float] = (0, 1, 5, 25, 50, 75, 95, 99, 100)
) -> dict[str, float]:
    """{"p50": ...} by linear interpolation between the sorted values; empty for no values."""
    ordered = sorted(values)
    found = {}
    for share in shares if ordered else ():
        at = (len(ordered) - 1) * share / 100
        low = int(at)
        high = min(low + 1, len(ordered) - 1)
        found[f"p{share:g}"] = ordered[low] + (ordered[high] - ordered[low]) * (at - low)
    return found


@dataclass
class FileSummary:
    """Figures of one manifest, over its lines that could be read."""

    path: str
    lines: int = 0
    durations: list[float] = field(default_factory=list)  # seconds
    speakers: set[str] = field(default_factory=set)
    characters: Counter = field(default_factory=Counter)
    words: Counter = field(default_factory=Counter)
    characters_per_second: list[float] = field(default_factory=list)
    ctc_frames_per_second: list[float] = field(default_factory=list)  # (characters + adjacent repeats) / duration

    @property
    def seconds(self) -> float:
        return sum(self.durations)

    def to_dict(self) -> dict[str, Any]:
        """Plain figures, without the lists they come from."""
        return {
            "path": self.path,
            "utterances": self.lines,
            "seconds": round(self.seconds, 3),
            "hours": round(self.seconds / 3600, 4),
            "speakers": len(self.speakers),
            "duration": _rounded(percentiles(self.durations)),
            "characters_per_second": _rounded(percentiles(self.characters_per_second)),
            "ctc_frames_per_second": _rounded(percentiles(self.ctc_frames_per_second)),
            "characters": dict(self.characters.most_common()),
            "words": self.words.total(),
            "distinct_words": len(self.words),
        }


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in values.items()}


@dataclass
class Report:
    """All that `manifests.validate.validate` found."""

    files: list[FileSummary] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    outside: dict[str, dict[str, Any]] = field(default_factory=dict)  # character -> count, utterances, first
    frames_per_second: float = 0.0  # what ctc_too_long was judged by, 0 for not at all

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "error"]

    @property
    def warnings(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.severity == "warning"]

    @property
    def ok(self) -> bool:
        """True where nothing is an error."""
        return not any(finding.severity == "error" for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """0 fine or warnings only, 1 errors, 2 a manifest that could not be read."""
        if any(finding.code == "unreadable" for finding in self.findings):
            return 2
        return 0 if self.ok else 1

    def total(self) -> FileSummary:
        """All files as one."""
        whole = FileSummary("all")
        for file in self.files:
            whole.lines += file.lines
            whole.durations += file.durations
            whole.speakers |= file.speakers
            whole.characters += file.characters
            whole.words += file.words
            whole.characters_per_second += file.characters_per_second
            whole.ctc_frames_per_second += file.ctc_frames_per_second
        return whole

    def to_dict(self) -> dict[str, Any]:
        """Everything, findings complete, for JSON; the words of all files with their counts are in the total."""
        total = self.total()
        return {
            "ok": self.ok,
            "errors": len(self.errors),
            "warnings": len(self.warnings),
            "counts": dict(Counter(finding.code for finding in self.findings)),
            "files": [file.to_dict() for file in self.files],
            "total": {**total.to_dict(), "vocabulary": dict(total.words.most_common())},
            "outside_labels": self.outside,
            "frames_per_second": self.frames_per_second,
            "findings": [finding._asdict() for finding in self.findings],
        }

    def save(self, path: str | os.PathLike) -> None:
        """Write to_dict() as JSON, whole or not at all."""
        text = json.dumps(self.to_dict(), ensure_ascii=True, indent=1)
        write_atomic(path, f"{text}\n".encode())

    def text(self, limit: int = 5) -> str:
        """The report for people: tables of files and findings, the first `limit` findings of each code, vocabulary."""
        parts = [self._files_table()]
        if self.findings:
            parts += [self._findings_table(), self._first_findings(limit)]
        if self.outside:
            parts.append(self._outside_text())
        parts.append(self._vocabulary_text())
        verdict = f"{len(self.errors)} errors, {len(self.warnings)} warnings"
        parts.append(verdict if self.findings else "no errors, no warnings")
        return "\n\n".join(part for part in parts if part)

    def _files_table(self) -> str:
        head = ["manifest", "utts", "hours", "speakers", "s min", "5%", "50%", "95%", "max"]
        head += ["chars/s", "errors", "warnings"]
        found = Counter((finding.file, finding.severity) for finding in self.findings)
        counts = [(found[file.path, "error"], found[file.path, "warning"]) for file in self.files]
        files = list(self.files)
        if len(files) > 1:
            files.append(self.total())
            counts.append((len(self.errors), len(self.warnings)))
        rows = []
        for file, (errors, warnings) in zip(files, counts, strict=True):
            seconds = [f"{value:.2f}" for value in percentiles(file.durations, (0, 5, 50, 95, 100)).values()]
            rate = [f"{value:.1f}" for value in percentiles(file.characters_per_second, (50,)).values()]
            rows.append(
                [file.path, str(file.lines), f"{file.seconds / 3600:.2f}", str(len(file.speakers))]
                + (seconds or ["-"] * 5)
                + (rate or ["-"])
                + [str(errors), str(warnings)]
            )
        return table(head, rows)

    def _findings_table(self) -> str:
        rows = []
        for severity in ("error", "warning"):
            for code, meaning in CODES.items():
                found = [f for f in self.findings if f.code == code and f.severity == severity]
                if found:
                    rows.append([severity, code, str(len(found)), f"{found[0].file}:{found[0].line}", meaning])
        return table(["severity", "code", "count", "first", "meaning"], rows, left=(0, 1, 3, 4))

    def _first_findings(self, limit: int) -> str:
        lines, seen = [], Counter()
        for finding in self.findings:
            seen[finding.severity, finding.code] += 1
            if seen[finding.severity, finding.code] <= limit:
                lines.append(str(finding))
        for (_, code), count in seen.items():
            if count > limit:
                lines.append(f"... and {count - limit} more of {code} (all with --json)")
        return "\n".join(lines)

    def _outside_text(self) -> str:
        parts = [
            f"{name_character(char)} {info['count']}x in {info['utterances']} ({info['first']})"
            for char, info in sorted(self.outside.items(), key=lambda item: -item[1]["count"])[:20]
        ]
        more = f", ... {len(self.outside) - 20} more" if len(self.outside) > 20 else ""
        return f"characters outside the labels, with the utterances they are in and the first: {', '.join(parts)}{more}"

    def _vocabulary_text(self) -> str:
        whole = self.total()
        if not whole.characters:
            return ""
        common = whole.characters.most_common(60)
        letters = " ".join(f"{name_character(char)}:{count}" for char, count in common)
        more = f" ... {len(whole.characters) - 60} more" if len(whole.characters) > 60 else ""
        lines = [
            f"{whole.words.total()} words, {len(whole.words)} distinct;"
            f" {len(whole.characters)} characters: {letters}{more}"
        ]
        if whole.ctc_frames_per_second:
            need = percentiles(whole.ctc_frames_per_second, (50, 99, 100))
            text = f"CTC needs {need['p50']:.1f} frames/s (median), {need['p99']:.1f} (99 %), {need['p100']:.1f} (most)"
            if self.frames_per_second:
                short = sum(rate > self.frames_per_second for rate in whole.ctc_frames_per_second)
                text += f"; at {self.frames_per_second:g} frames/s {short} of {whole.lines} utterances do not fit"
            lines.append(text)
        return "\n".join(lines)


def name_character(char: str) -> str:
    """A character as it can stand in a list: itself, "space", or its code point where it shows nothing."""
    if char == " ":
        return "space"
    return char if char.isprintable() else f"U+{ord(char):04X}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Rows of strings under a head, in columns; those numbered in `left` are aligned to the left."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = []
    for row in [head, ["-" * width for width in widths], *rows]:
        cells = [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
