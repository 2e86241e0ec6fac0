"""Your own recordings to a manifest: a table of paths and texts is all it takes.

    python -m manifests.own_data recordings.csv --out data/mine/train.json
    python -m manifests.own_data recordings.csv --out data/mine --split 0.1

The table is CSV or TSV, with a header that names a column of paths (path, audio, file, ...) and one of texts (text,
transcript, sentence, ...), or with two columns and no header; or JSON, an array or lines of objects with those names.
Paths are relative to the table's folder (or to --audio-dir). Durations and sampling rates come from the audio's own
headers, text is normalised as everywhere in this project, and a speaker or id column is kept where there is one.
Punctuation but apostrophes is dropped, since the recipes' labels have none; --keep-punctuation is for other labels.

With --split, --out is a folder for train.json, dev.json and test.json; the share given goes to each of the last two.
Which utterance goes where hangs on a hash of its text, so that no sentence is in two of them and each stays where it
is when you add more; with --split-by speaker it hangs on the speaker.
"""

import argparse
import hashlib
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from manifests.audio import AudioError, read_header
from manifests.schema import LABELS, show, write_manifest
from manifests.table import Entry, TableError, read_table
from manifests.text import normalize

MAX_SHOWN = 20  # bad rows


def strip_punctuation(text: str) -> str:
    """Punctuation and symbols gone, apostrophes kept; of normalised text. What they parted stays apart ("and/or")."""
    kept = [char if char == "'" or unicodedata.category(char)[0] not in "PS" else " " for char in text]
    return " ".join("".join(kept).split())


def build_rows(
    table: str | os.PathLike,
    audio_dir: str | os.PathLike | None = None,
    punctuation: bool = False,
    skip_bad: bool = False,
    progress: bool = False,
    on_stripped: Callable[[str, str], None] | None = None,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Manifest rows of a table, in its order, and its bad rows as messages that start with `file:line:`.

    Args:
        table: .csv, .tsv, .json or .jsonl file.
        audio_dir: what relative paths are relative to; None for the table's folder.
        punctuation: keep it in the text.
        skip_bad: leave bad rows out instead of raising.
        progress: show a bar on a terminal.
        on_stripped: told (text before, text) of each row whose text lost punctuation.

    Raises:
        TableError: the table cannot be read, or has bad rows (up to 20 are listed), or no good one.
    """
    folder = Path(table).resolve().parent if audio_dir is None else Path(audio_dir).resolve()
    entries: Iterable[Entry] = read_table(table)
    if progress:
        from tqdm import tqdm

        entries = tqdm(entries, desc="audio headers", unit=" utt", disable=None)
    rows, problems = [], []
    seen: dict[str, int] = {}
    for entry in entries:
        try:
            row = _build_row(entry, folder, punctuation)
            first = seen.setdefault(row["audio_filepath"], entry.line)
            if first != entry.line:
                raise TableError(f"audio {row['audio_filepath']} stands on line {first} already: remove one of them")
            rows.append(row)
            if on_stripped is not None and (whole := normalize(entry.text)) != row["text"]:
                on_stripped(whole, row["text"])
        except (TableError, AudioError) as error:
            problems.append(f"{table}:{entry.line}: {error}")
    if problems and not skip_bad or not rows:
        more = f"\n... and {len(problems) - MAX_SHOWN} more" if len(problems) > MAX_SHOWN else ""
        count = f"{len(problems)} of {len(problems) + len(rows)} rows are bad, nothing written"
        hint = " (--skip-bad leaves them out)" if rows else ""
        raise TableError("\n".join([f"{table}: {count}{hint}:", *problems[:MAX_SHOWN]]) + more)
    return rows, problems


def _build_row(entry: Entry, folder: Path, punctuation: bool) -> dict[str, Any]:
    for name, value in (("audio", entry.audio), ("text", entry.text)):
        if not isinstance(value, str) or not value.strip():
            raise TableError(f"{name} is {show(value)}: give a {'path' if name == 'audio' else 'transcript'}")
    text = normalize(entry.text)
    if not punctuation:
        text = strip_punctuation(text)
    if not text:
        raise TableError(f"text {show(entry.text)} is nothing but punctuation: give its words or remove the row")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TableError(f"text {show(entry.text)} has a lone surrogate, which is no character: mend it") from error
    audio = entry.audio.strip()
    if "\0" in audio:
        raise TableError(f"audio {show(audio)} is no path: name a file")
    path = os.path.normpath(os.path.join(folder, os.path.expanduser(audio)))
    header = read_header(path)
    if header.channels != 1:
        raise TableError(f"{path} has {header.channels} channels: mix it down to one")
    row: dict[str, Any] = {
        "audio_filepath": path,
        "duration": header.duration,
        "sampling_rate": header.sampling_rate,
        "text": text,
    }
    for name, value in (("speaker", entry.speaker), ("utterance", entry.utterance)):
        if value is not None and str(value).strip():
            row[name] = str(value).strip()
    return row


def split_rows(rows: Sequence[dict[str, Any]], share: float, by: str = "text") -> dict[str, list[dict[str, Any]]]:
    """Rows as {"train", "dev", "test"}, in their order; `share` of the values of field `by` for dev, and for test.

    A value's place hangs on its hash alone, so that it stays when others are added, unless a split would be empty:
    then the values with the lowest hashes make up the test and dev sets, at least one each.

    Raises:
        TableError: a row without the field, or fewer than three different values of it.
    """
    if not 0 < share < 0.5:
        raise TableError(f"--split {share}: give the share of dev, and of test, between 0 and 0.5")
    for row in rows:
        if by not in row:
            raise TableError(f"{row['audio_filepath']}: has no {by} to split by: add that column")
    place = {row[by]: int.from_bytes(hashlib.sha256(row[by].encode()).digest()[:8], "big") / 2**64 for row in rows}
    if len(place) < 3:
        raise TableError(f"{len(place)} different {by}s cannot be split in three: leave --split out or add data")
    names = {value: "test" if at < share else "dev" if at < 2 * share else "train" for value, at in place.items()}
    if len(set(names.values())) < 3:
        ordered = sorted(place, key=place.__getitem__)
        size = max(1, min(round(len(ordered) * share), (len(ordered) - 1) // 2))
        names = {value: "test" if i < size else "dev" if i < 2 * size else "train" for i, value in enumerate(ordered)}
    return {name: [row for row in rows if names[row[by]] == name] for name in ("train", "dev", "test")}


def outside_labels(rows: Iterable[dict[str, Any]], labels: Iterable[str] = LABELS) -> Counter:
    """How often each character that is no label stands in the rows' texts."""
    counts = Counter("".join(row["text"] for row in rows))
    return Counter({char: count for char, count in counts.items() if char not in set(labels)})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m manifests.own_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", metavar="FILE", help=".csv, .tsv, .json or .jsonl of paths and texts")
    parser.add_argument("--out", metavar="PATH", type=Path, required=True, help="manifest, or with --split a folder")
    parser.add_argument("--split", metavar="SHARE", type=float, help="share of dev, and of test, such as 0.1")
    parser.add_argument("--split-by", choices=("text", "speaker"), default="text", help="what no two splits share")
    parser.add_argument("--audio-dir", metavar="DIR", help="what paths are relative to (default: the table's folder)")
    parser.add_argument("--keep-punctuation", action="store_true", help="for labels of your own that hold it")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad rows out, and say which")
    args = parser.parse_args(argv)
    # Texts and file names can hold what a terminal's encoding cannot.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if args.split is None and args.out.is_dir():
            raise TableError(f"--out {args.out}: is a folder: name the manifest, as in {args.out / 'train.json'}")
        if args.split is not None and args.out.suffix == ".json":
            raise TableError(f"--out {args.out}: names a file: with --split name a folder for the three")
        splits = ("train", "dev", "test")
        for path in [args.out] if args.split is None else [args.out / f"{name}.json" for name in splits]:
            if path.exists() and os.path.exists(args.table) and path.samefile(args.table):
                raise TableError(f"--out {args.out}: would replace the table {args.table}: name another place")
        stripped: list[tuple[str, str]] = []
        rows, problems = build_rows(
            args.table, args.audio_dir, args.keep_punctuation, args.skip_bad, progress=True,
            on_stripped=lambda *texts: stripped.append(texts),
        )
        if args.split is None:
            files = {args.out: rows}
        else:
            parts = split_rows(rows, args.split, args.split_by)
            files = {args.out / f"{name}.json": part for name, part in parts.items()}
        for path, part in files.items():
            write_manifest(path, part)
            print(f"{path}: {len(part)} utterances, {sum(row['duration'] for row in part) / 3600:.2f} h")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for problem in problems[:MAX_SHOWN]:
        print(f"left out: {problem}", file=sys.stderr)
    if len(problems) > MAX_SHOWN:
        print(f"... and {len(problems) - MAX_SHOWN} more left out", file=sys.stderr)
    for rate, count in Counter(row["sampling_rate"] for row in rows).most_common():
        if rate != 16000:
            print(f"note: {count} files have {rate} Hz; they are resampled to the recipe's rate as they are read")
    if stripped:
        before, after = map(show, min(stripped, key=lambda texts: len(texts[0])))
        count = f"{len(stripped)} of {len(rows)} texts"
        print(f"note: {count} lost punctuation, which --keep-punctuation keeps: {before} is now {after}")
    if outside := outside_labels(rows):
        shown = " ".join(f"{show(char)}:{count}" for char, count in outside.most_common(20))
        first = show(next(row["text"] for row in rows if outside.keys() & row["text"]))
        hint = "leave --keep-punctuation out, spell out the rest" if args.keep_punctuation else "spell them out"
        print(f"warning: characters outside the default labels, with which training refuses a text: {shown}, first in "
              f"{first}: {hint}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
