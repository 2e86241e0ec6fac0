"""Tables of paths and texts as people have them: CSV, TSV, JSON and JSON lines, read with the line of each row."""

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from manifests.schema import show

# Names that a column may have, the preferred ones first; case does not matter.
AUDIO_NAMES = ("audio_filepath", "audio", "path", "file", "audio_path", "audio_file", "file_path", "filepath")
AUDIO_NAMES += ("filename", "file_name", "wav", "wav_filename", "wav_path")
TEXT_NAMES = ("text", "transcript", "transcription", "sentence", "normalized_text")
SPEAKER_NAMES = ("speaker", "speaker_id", "client_id")
ID_NAMES = ("utterance", "utterance_id", "id")


class TableError(ValueError):
    """A table, or rows of it, that cannot become a manifest. Each line of the message starts with `file:line:`."""


class Entry(NamedTuple):
    """One row of the table as it was written: its line, and its fields, of which some may be None."""

    line: int
    audio: Any
    text: Any
    speaker: Any = None
    utterance: Any = None


def read_table(path: str | os.PathLike) -> list[Entry]:
    """All rows of a .csv, .tsv, .json or .jsonl file.

    Raises:
        TableError: another kind of file, not UTF-8, broken CSV or JSON, unknown columns, or no rows.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
        # Spreadsheets save a byte order mark.
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise TableError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        value = show(raw[error.start : error.start + 8])
        raise TableError(f"{path}:{line}: is not UTF-8 at {value}: save the table as UTF-8") from error
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        entries = list(_read_csv(path, text, tabs=kind == ".tsv"))
    elif kind in (".json", ".jsonl"):
        entries = [_json_entry(path, line, item) for line, item in _json_items(path, text)]
    else:
        raise TableError(f"{path}: ends with {kind!r}: give a .csv, .tsv, .json or .jsonl file")
    if not entries:
        raise TableError(f"{path}:1: holds no rows: write one a recording, with its path and text")
    return entries


def _column(names: Sequence[str], wanted: Sequence[str]) -> int | None:
    """Index in `names` of the first of `wanted` that is there."""
    return next((names.index(name) for name in wanted if name in names), None)


def _read_csv(path: Path, text: str, tabs: bool) -> Iterator[Entry]:
    separator = "\t" if tabs else _separator(text)
    # In TSV, as Common Voice has it, a quotation mark is a character like others.
    quoting = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=quoting, strict=True)
    columns: list[int | None] | None = None
    width = line = 0
    try:
        for row in reader:
            # A quoted cell may go over some lines; the row is named by its first.
            line, start = reader.line_num, line + 1
            if not any(cell.strip() for cell in row):
                continue
            if columns is None:
                columns, width = _columns(path, start, row), len(row)
                if columns[0] is not None:
                    continue
                columns = [0, 1, None, None]
            if len(row) != width:
                shown = show(separator.join(row))
                hint = "put text with a comma in double quotes" if separator == "," else "mend the row"
                raise TableError(f"{path}:{start}: has {len(row)} cells where {width} are expected: {shown}: {hint}")
            yield Entry(start, *(None if column is None else row[column] for column in columns))
    except csv.Error as error:
        raise TableError(f"{path}:{reader.line_num}: is not CSV ({error}): mend its quotation marks") from error


def _separator(text: str) -> str:
    """The separator of a CSV file, by its first row: a text there may hold more of another kind.

    The one under which most columns of a header are found, else one that gives two cells, else the commonest.
    """
    found: dict[str, tuple[int, bool, int]] = {}
    for separator in ",;\t|":
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
        try:
            row = next((row for row in reader if any(cell.strip() for cell in row)), [])
        except csv.Error:
            row = []
        names = [cell.strip().lower() for cell in row]
        columns = sum(_column(names, wanted) is not None for wanted in (AUDIO_NAMES, TEXT_NAMES))
        found[separator] = columns, len(row) == 2, text.partition("\n")[0].count(separator)
    return max(found, key=found.__getitem__)


def _columns(path: Path, line: int, row: list[str]) -> list[int | None]:
    """Indices of audio, text, speaker and id by a header; all None where the first row is none but has two cells."""
    names = [cell.strip().lower() for cell in row]
    columns = [_column(names, wanted) for wanted in (AUDIO_NAMES, TEXT_NAMES, SPEAKER_NAMES, ID_NAMES)]
    if columns[0] is not None and columns[1] is not None:
        return columns
    if columns[0] is None and columns[1] is None and len(row) == 2:
        return [None, None, None, None]
    missing = "paths" if columns[0] is None else "texts"
    known = AUDIO_NAMES if columns[0] is None else TEXT_NAMES
    raise TableError(f"{path}:{line}: no column of {missing} in {show(row)}: name one of them {', '.join(known[:5])}")


def _json_items(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """(line, item) of an array's items or of values that follow each other."""
    decoder = json.JSONDecoder()
    blanks = " \t\r\n"
    at, line, counted = 0, 1, 0
    array = text.lstrip(blanks).startswith("[")
    if array:
        at = text.index("[") + 1
    first = True
    while True:
        while at < len(text) and text[at] in blanks:
            at += 1
        line, counted = line + text.count("\n", counted, at), at
        if not array and at == len(text):
            break
        if array and text[at : at + 1] == "]":
            rest = text[at + 1 :].lstrip(blanks)
            if rest:
                line += text.count("\n", at, len(text) - len(rest))
                raise TableError(f"{path}:{line}: {show(rest)} follows the array: remove it, or put it inside")
            break
        if array and not first:
            if text[at : at + 1] != ",":
                raise TableError(f"{path}:{line}: is not JSON, a comma or ] is missing: mend the array")
            at += 1
            while at < len(text) and text[at] in blanks:
                at += 1
            line, counted = line + text.count("\n", counted, at), at
        try:
            item, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            message = f"{path}:{error.lineno}: is not JSON, {error.msg.lower()} at column {error.colno}: mend the file"
            raise TableError(message) from error
        except (ValueError, RecursionError) as error:
            reason = type(error).__name__
            raise TableError(f"{path}:{line}: cannot be read as JSON ({reason}): mend the file") from error
        first = False
        yield line, item


def _json_entry(path: Path, line: int, item: Any) -> Entry:
    if not isinstance(item, dict):
        raise TableError(f'{path}:{line}: is {show(item)}, not an object: write {{"path": ..., "text": ...}}')
    names = [name.strip().lower() for name in item]
    values = list(item.values())
    columns = [_column(names, wanted) for wanted in (AUDIO_NAMES, TEXT_NAMES, SPEAKER_NAMES, ID_NAMES)]
    for column, wanted in zip(columns[:2], (AUDIO_NAMES, TEXT_NAMES), strict=True):
        if column is None:
            raise TableError(f"{path}:{line}: no {wanted[0]!r} in {show(item)}: add one of {', '.join(wanted[:5])}")
    return Entry(line, *(None if column is None else values[column] for column in columns))
