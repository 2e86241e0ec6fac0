"""What a NeMo manifest line holds, and the one reader and writer of manifests.

A manifest is a text file in UTF-8 with one JSON object a line, one line an utterance:

    {"audio_filepath": "/data/a.flac", "duration": 3.965, "sampling_rate": 16000, "text": "hello there", ...}

`FIELDS` says what each field may be; unknown fields are kept as they are, since NeMo's tools add their own. The reader
refuses what NeMo would misread without a word (a missing text is an empty target to it, a NaN duration passes its
filters), always in one line that names file, line and value.
"""

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from manifests.shards_format import is_sharded, shard_path

# The characters of the project's CTC labels; the blank comes after them (index 28).
LABELS = (" ", *"abcdefghijklmnopqrstuvwxyz", "'")


class Field(NamedTuple):
    """One field of a manifest line: the Python types it may have, whether it must be there, and what it means."""

    types: tuple[type, ...]
    required: bool
    meaning: str


FIELDS: dict[str, Field] = {
    "audio_filepath": Field((str,), True, "path of the audio, absolute or relative to the manifest's folder"),
    "duration": Field((int, float), True, "seconds of audio, over 0"),
    "text": Field((str,), True, "reference transcript, lower case"),
    "sampling_rate": Field((int,), False, "samples a second of the file; lets lhotse skip opening it"),
    "offset": Field((int, float), False, "seconds into the file where the utterance starts, 0 or more"),
    "speaker": Field((str, int), False, "speaker id"),
    "chapter": Field((str, int), False, "chapter id"),
    "utterance": Field((str, int), False, "utterance id, unique in the corpus"),
    "gender": Field((str,), False, "F or M"),
    "lang": Field((str,), False, "language code"),
    "pred_text": Field((str,), False, "hypothesis, written by an evaluation"),
}
_REQUIRED = tuple(name for name, field in FIELDS.items() if field.required)


class ManifestError(ValueError):
    """A manifest, or a row for one, that cannot be used. The message is one line and starts with `file:line:`."""


class Problem(NamedTuple):
    """What is wrong with one line: a stable code, what it is and what to do in words, and the value and field meant."""

    code: str
    message: str
    value: str = ""
    field: str = ""


class Line(NamedTuple):
    """One non-blank line of a manifest: its number from 1, its object where it parsed, and what is wrong with it."""

    number: int
    row: dict[str, Any] | None
    problems: tuple[Problem, ...] = ()


def show(value: Any, limit: int = 60) -> str:
    """`value` as it would stand in Python, on one line and cut to `limit` characters, for messages."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"<{type(value).__name__} nested too deeply>"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _names(types: tuple[type, ...]) -> str:
    words = {str: "a string", int: "an integer", float: "a number"}
    return "a number" if float in types else " or ".join(words[kind] for kind in types)


def check_row(row: dict[str, Any], required: Iterable[str] | None = None) -> list[Problem]:
    """All that is wrong with one parsed row by `FIELDS`; empty when it is good. No file is opened.

    `required` replaces the fields that must be there (for a list of audio without text, say).
    """
    problems = []
    for name in _REQUIRED if required is None else required:
        if name not in row:
            hint = {"text": "NeMo would train on an empty target", "duration": "take it from the audio's header"}
            problems.append(
                Problem("missing_field", f"no {name!r} field ({hint.get(name, 'required')}): add it to {show(row)}")
            )
    for name, value in row.items():
        field = FIELDS.get(name)
        if field is None:
            continue
        # The exact type first, for speed. bool is an int to Python, and never what a manifest means.
        if type(value) not in field.types and (not isinstance(value, field.types) or isinstance(value, bool)):
            message = f"{name} is {show(value)}, of type {type(value).__name__}: make it {_names(field.types)}"
            problems.append(Problem("wrong_type", message, show(value), name))
        elif isinstance(value, str):
            if not value.isascii() and not _encodes(value):
                message = f"{name} {show(value)} has a lone surrogate, which is no character: write it as UTF-8"
                problems.append(Problem("bad_string", message, show(value), name))
            elif name == "audio_filepath" and (not value or "\0" in value):
                message = f"audio_filepath {show(value)} is no path: name a file"
                problems.append(Problem("bad_path", message, show(value), name))
        elif name in _RANGES and (wrong := _RANGES[name](value)):
            problems.append(Problem(f"bad_{name}", f"{name} is {show(value)}: {wrong}", show(value), name))
    return problems


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _bad_duration(value: float) -> str:
    # An integer too large for a float is caught as the infinity that it would become.
    if not _finite(value):
        return "it must be a finite number of seconds; take it from the audio's header"
    return "" if value > 0 else "it must be over 0 seconds; take it from the audio's header or drop the line"


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


_RANGES: dict[str, Callable[[Any], str]] = {
    "duration": _bad_duration,
    "offset": lambda value: "" if _finite(value) and value >= 0 else "it must be 0 or more seconds",
    "sampling_rate": lambda value: "" if 0 < value < 2**31 else "it must be samples a second, such as 16000",
}


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"field {show(next(n for n in names if names.count(n) > 1))} stands twice")
    return row


_decode = json.JSONDecoder(object_pairs_hook=_no_duplicates).decode


def parse_line(number: int, raw: bytes, required: Iterable[str] | None = None) -> Line:
    """Parse one line's bytes (with or without its end of line); whatever they are, the answer is a Line."""
    if number == 1 and raw.startswith(b"\xef\xbb\xbf"):
        message = "starts with a byte order mark, which NeMo cannot read: save the file as UTF-8 without it"
        return Line(number, None, (Problem("bom", message),))
    try:
        row = _decode(raw.decode().strip())
    except UnicodeDecodeError as error:
        value = show(raw[error.start : error.start + 8])
        message = f"is not UTF-8 at byte {error.start + 1} ({value}): save the file as UTF-8"
        return Line(number, None, (Problem("not_utf8", message, value),))
    except json.JSONDecodeError as error:
        value = show(raw.decode().strip())
        message = f"is not JSON, {error.msg.lower()} at column {error.colno} of {value}: write one JSON object a line"
        return Line(number, None, (Problem("not_json", message, value),))
    except (ValueError, RecursionError) as error:
        # A field given twice, a number of thousands of digits, or brackets nested by the thousand.
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).split(";")[0]
        return Line(number, None, (Problem("not_json", f"cannot be read, {reason}: write one JSON object a line"),))
    if not isinstance(row, dict):
        value = show(row)
        message = f"is {value}, a {type(row).__name__}, not an object: write one {{...}} a line"
        return Line(number, None, (Problem("not_object", message, value),))
    return Line(number, row, tuple(check_row(row, required)))


def scan_manifest(
    path: str | os.PathLike, required: Iterable[str] | None = None, on_blank: Callable[[int], None] | None = None
) -> Iterator[Line]:
    """Yield every non-blank line of a manifest with its problems, never stopping at one.

    `on_blank` is told the numbers of blank lines, which NeMo's own loader skips and lhotse's dies of.

    Raises:
        ManifestError: the file cannot be opened or read.
    """
    required = None if required is None else tuple(required)
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                if raw.isspace():
                    if on_blank is not None:
                        on_blank(number)
                else:
                    yield parse_line(number, raw, required)
    except OSError as error:
        raise ManifestError(f"{os.fspath(path)}: cannot read the manifest: {error.strerror or error}") from error


def iter_manifest(
    path: str | os.PathLike, required: Iterable[str] | None = None, blank: bool = True
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, row) of each utterance. Blank lines are skipped, or an error where not `blank`.

    Raises:
        ManifestError: at the first line that is not good, at a file that cannot be read, or that holds no utterance.
    """
    path = os.fspath(path)
    empty = True

    def refuse(number: int) -> None:
        raise ManifestError(f"{path}:{number}: is blank, which lhotse cannot read: take the line out")

    for line in scan_manifest(path, required, on_blank=None if blank else refuse):
        if line.problems:
            raise ManifestError(f"{path}:{line.number}: {line.problems[0].message}")
        empty = False
        yield line.number, line.row
    if empty:
        raise ManifestError(f"{path}:1: holds no utterance: build it again (python -m manifests.librispeech)")


def read_manifest(path: str | os.PathLike, required: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """All rows of a manifest, checked by `FIELDS`; ManifestError (see iter_manifest) where one is not good."""
    return [row for _, row in iter_manifest(path, required)]


# A row that holds itself ends in RecursionError without the (slower) check for circles.
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False).encode


def write_manifest(
    path: str | os.PathLike, rows: Iterable[dict[str, Any]], required: Iterable[str] | None = None
) -> int:
    """Write rows as a manifest, whole or not at all; returns how many. The folder is made where it is missing.

    Raises:
        ManifestError: a row that the reader would refuse, or that JSON cannot hold; the old file, if any, stays.
        OSError: the folder cannot be written to.
    """
    path = os.fspath(path)
    required = None if required is None else tuple(required)
    lines = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ManifestError(f"{path}:{number}: row is {show(row)}, not a dict: nothing was written")
        if problems := check_row(row, required):
            raise ManifestError(f"{path}:{number}: {problems[0].message}; nothing was written")
        try:
            line = _encode(row)
            if not line.isascii():
                line.encode()
        except (TypeError, ValueError, RecursionError) as error:
            message = f"{path}:{number}: JSON cannot hold {show(row)} ({error}); nothing was written"
            raise ManifestError(message) from error
        lines.append(line)
    lines.append("")
    write_atomic(path, "\n".join(lines).encode())
    return len(lines) - 1


def write_atomic(path: str | os.PathLike, data: bytes) -> None:
    """Put `data` at `path` so that no reader, and no crash, ever sees half of it. Makes the folder.

    A file that holds `data` already is left as it is, with its time: what was made from it stays newer.
    """
    target = Path(path)
    if _holds(target, data):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:100]}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes the file private; give it what open() would have given.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(part, 0o666 & ~umask)
        os.replace(part, target)
    except BaseException:
        os.unlink(part)
        raise


def _holds(path: Path, data: bytes) -> bool:
    try:
        return path.stat().st_size == len(data) and path.read_bytes() == data
    except OSError:
        return False


def resolve_audio(row: dict[str, Any], manifest_path: str | os.PathLike) -> str:
    """The path at which NeMo will look for a row's audio.

    As NeMo 3.0.0 does it (`get_full_path`): an absolute path as it is, `~` expanded, a relative path from the
    manifest's folder, and only where that does not exist but the same from the working folder does, the latter.
    Of a row of shards it is the place in the tar, which `manifests.shards_format.read_shard` reads.
    """
    if is_sharded(row):
        return shard_path(row, manifest_path)
    audio = row["audio_filepath"]
    if os.path.isabs(audio):
        return audio
    beside = os.path.join(os.path.dirname(os.path.abspath(os.fspath(manifest_path))), audio)
    if os.path.isfile(beside):
        return beside
    elsewhere = os.path.abspath(os.path.expanduser(audio))
    return elsewhere if os.path.isfile(elsewhere) else beside
