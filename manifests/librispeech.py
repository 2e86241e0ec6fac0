"""A native LibriSpeech tree to NeMo manifests.

    python -m manifests.librispeech SRC --out DIR --subsets train-clean-5 dev-clean-2

SRC holds the subset folders, laid out as the official archives do it:
SRC/<subset>/<speaker>/<chapter>/<speaker>-<chapter>-<number>.flac with <speaker>-<chapter>.trans.txt beside them, and
SRC/SPEAKERS.TXT. It writes DIR/<subset>.json, one JSON object a line, and nothing else. Any corpus in this layout is
read, whatever its subsets are called.

Durations are exact: samples over rate, from the FLAC header. The files themselves are not decoded, but each must hold
its last frame, so that a tree copied in part is told from a whole one. The order of lines is that of the names of
speaker, chapter and utterance as text, on every machine and with any number of workers.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from manifests.archives import ARCHIVES
from manifests.flac import FlacError, FlacInfo, read_info
from manifests.schema import ManifestError, show, write_manifest
from manifests.text import normalize

MAX_SHOWN = 20  # of the problems in one tree


class CorpusError(ValueError):
    """A corpus tree that cannot be used as it is. The message has one line a problem, each with its file."""


class Chapter(NamedTuple):
    """One <speaker>/<chapter> folder's rows, and its problems, each a line that names its file."""

    rows: list[dict[str, Any]]
    problems: list[str]


def find_root(src: str | os.PathLike) -> Path:
    """The folder that holds the subsets: `src`, or `src`/LibriSpeech where an archive was unpacked there.

    Raises:
        CorpusError: `src` is no folder.
    """
    src = Path(src)
    if not src.is_dir():
        raise CorpusError(f"{src}: no such folder: give the one that holds the subsets (.../LibriSpeech)")
    inner = src / "LibriSpeech"
    return inner if inner.is_dir() else src


def list_subsets(root: Path) -> list[str]:
    """Names of the folders in `root` that could be subsets, sorted."""
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def find_subset(root: Path, subset: str) -> Path:
    """The folder of a subset of `root`.

    Raises:
        CorpusError: there is none of that name; the message gives the nearest name and all that are there.
    """
    here = list_subsets(root)
    if subset in here:
        return root / subset
    if not here:
        raise CorpusError(f"{root}: holds no subset folders: give the folder that does (.../LibriSpeech)")
    near = difflib.get_close_matches(subset, here, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise CorpusError(f"{root}: no subset {subset!r}: {hint}there are: {', '.join(here)}")


def read_genders(root: Path) -> dict[str, str]:
    """Speaker id to "F" or "M" from SPEAKERS.TXT; empty where there is no such file.

    Raises:
        CorpusError: a line that is neither a comment (;) nor `id | sex | ...`.
    """
    path = root / "SPEAKERS.TXT"
    genders = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith(";"):
            continue
        fields = [field.strip() for field in line.split("|", 2)]
        if len(fields) < 2 or not fields[0] or fields[1].upper() not in ("F", "M"):
            raise CorpusError(f"{path}:{number}: {show(line)} is not `id | F or M | ...`: mend the line or remove it")
        genders[fields[0]] = fields[1].upper()
    return genders


def read_ids(path: str | os.PathLike) -> dict[str, int]:
    """Utterance id to line number from a file with one id a line; blank lines and lines that start with # are skipped.

    Raises:
        CorpusError: the file cannot be read, holds no id, or a line is not one id.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path}: cannot read the list of ids: {error}") from error
    ids: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if line and not line.startswith("#"):
            if len(line.split()) > 1:
                raise CorpusError(f"{path}:{number}: {show(line)} is not one utterance id: write one id a line")
            ids.setdefault(line, number)
    if not ids:
        raise CorpusError(f"{path}: holds no utterance id: write one id a line")
    return ids


def list_chapters(folder: Path) -> list[tuple[str, str]]:
    """(speaker, chapter) names under a subset's folder, sorted as text."""
    found = []
    for speaker in os.scandir(folder):
        if speaker.name.startswith(".") or not speaker.is_dir():
            continue
        for chapter in os.scandir(speaker.path):
            if not chapter.name.startswith(".") and chapter.is_dir():
                found.append((speaker.name, chapter.name))
    return sorted(found)


def read_transcripts(path: str, prefix: str, problems: list[str]) -> dict[str, tuple[str, int]]:
    """Utterance id to (transcript as it stands, line number) of one trans.txt; problems are added to the list."""
    with open(path, "rb") as file:
        raw = file.read()
    try:
        lines = raw.decode().split("\n")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        value = show(raw[error.start : error.start + 8])
        problems.append(f"{path}:{line}: is not UTF-8 at {value}: save the file as UTF-8")
        return {}
    transcripts: dict[str, tuple[str, int]] = {}
    for number, line in enumerate(lines, 1):
        utterance, _, text = line.strip().partition(" ")
        if not utterance:
            continue
        if not utterance.startswith(prefix) or not text:
            if not utterance.startswith(prefix):
                what = f"starts with {show(utterance)}, not with an id of this folder ({prefix}...)"
            else:
                what = f"has id {utterance} and no transcript"
            problems.append(f"{path}:{number}: {what}: mend the line as `ID TRANSCRIPT`")
        elif utterance in transcripts:
            first = transcripts[utterance][1]
            problems.append(f"{path}:{number}: id {utterance} stands on line {first} already: remove one of them")
        else:
            transcripts[utterance] = text, number
    return transcripts


def read_header(path: str, problems: list[str]) -> FlacInfo | None:
    """STREAMINFO of one whole, non-empty FLAC file, or None with the problem added to the list."""
    try:
        info = read_info(path, whole=True)
        if info.total_samples:
            return info
        problems.append(f"{path}: holds 0 samples: unpack the archive again")
    except FlacError as error:
        problems.append(f"{path}: {error}: unpack the archive again")
    except OSError as error:
        problems.append(f"{path}: cannot be read: {error.strerror}")
    return None


def build_chapter(
    folder: str, shown: str, speaker: str, chapter: str, ids: frozenset[str] | set[str] | None, gender: str | None
) -> Chapter:
    """Rows of one chapter: `folder` is where it is read, `shown` what audio paths start with in the rows."""
    problems: list[str] = []
    # Hidden files are none of the corpus (macOS leaves a "._" file beside each).
    names = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    flacs = {name[:-5] for name in names if name.endswith(".flac")}
    prefix = f"{speaker}-{chapter}-"
    transcripts: dict[str, tuple[str, int]] = {}
    for name in names:
        if name.endswith(".trans.txt"):
            trans = os.path.join(folder, name)
            for utterance, (text, number) in read_transcripts(trans, prefix, problems).items():
                if ids is not None and utterance not in ids:
                    continue
                if utterance in transcripts:
                    problems.append(f"{trans}:{number}: id {utterance} stands in another trans.txt of its folder too")
                elif utterance not in flacs:
                    problems.append(f"{trans}:{number}: no {utterance}.flac beside it: unpack the archive again")
                else:
                    transcripts[utterance] = text, number
    if not problems:
        # A broken line is the reason for a missing transcript, so one problem is named and not two.
        for utterance in sorted(flacs - transcripts.keys()):
            if ids is None or utterance in ids:
                problems.append(f"{folder}/{utterance}.flac: no line for it in a trans.txt beside it")
    rows = []
    for utterance in sorted(transcripts):
        name = f"/{utterance}.flac"
        info = read_header(folder + name, problems)
        if info is None:
            continue
        row = {
            "audio_filepath": shown + name,
            "duration": info.total_samples / info.sampling_rate,
            "sampling_rate": info.sampling_rate,
            "text": normalize(transcripts[utterance][0]),
            "speaker": speaker,
            "chapter": chapter,
            "utterance": utterance,
        }
        if gender:
            row["gender"] = gender
        rows.append(row)
    return Chapter(rows, problems)


def _build_many(tasks: list[tuple]) -> list[Chapter]:
    return [build_chapter(*task) for task in tasks]


def _chapters(tasks: list[tuple], workers: int) -> Iterator[Chapter]:
    """build_chapter over the tasks, in their order whatever the number of processes."""
    if workers <= 1 or len(tasks) < 2:
        for task in tasks:
            yield build_chapter(*task)
        return
    # Some pieces a worker, so that one long speaker does not keep the others waiting.
    size = -(-len(tasks) // (workers * 8))
    pieces = [tasks[at : at + size] for at in range(0, len(tasks), size)]
    with ProcessPoolExecutor(min(workers, len(pieces))) as pool:
        for chapters in pool.map(_build_many, pieces):
            yield from chapters


def build_rows(
    src: str | os.PathLike,
    subset: str,
    ids: Iterable[str] | None = None,
    workers: int = 1,
    relative_to: str | os.PathLike | None = None,
) -> list[dict[str, Any]]:
    """Manifest rows of one subset, in order.

    Args:
        src: the folder that holds the subsets (or one with a LibriSpeech folder that does).
        subset: name of the subset's folder.
        ids: keep only these utterances and look at no other's files; an id that is not there is left out.
        workers: processes that read headers.
        relative_to: the manifest's folder, for audio paths relative to it; None for absolute paths.

    Raises:
        CorpusError: no such subset, or a tree with missing, broken or contradicting files (up to 20 of them listed).
    """
    root = find_root(src)
    folder = find_subset(root, subset)
    genders = read_genders(root)
    ids = None if ids is None else frozenset(ids)
    # With relative paths both ends are resolved: ".." out of a folder reached by a link leads elsewhere than it looks.
    here = os.path.abspath(folder)
    shown = here
    if relative_to is not None:
        shown = os.path.relpath(os.path.realpath(folder), os.path.realpath(relative_to))
    tasks = [
        (f"{here}/{speaker}/{chapter}", f"{shown}/{speaker}/{chapter}", speaker, chapter, ids, genders.get(speaker))
        for speaker, chapter in list_chapters(folder)
    ]
    if not tasks:
        raise CorpusError(f"{folder}: holds no <speaker>/<chapter> folders: unpack the archive again")
    rows, problems = [], []
    for chapter in _chapters(tasks, workers):
        rows += chapter.rows
        problems += chapter.problems
    if problems:
        more = f"\n... and {len(problems) - MAX_SHOWN} more" if len(problems) > MAX_SHOWN else ""
        listed = "\n".join(problems[:MAX_SHOWN])
        raise CorpusError(f"{folder}: {len(problems)} problem(s), nothing written:\n{listed}{more}")
    if not rows and ids is None:
        raise CorpusError(f"{folder}: holds no utterances: unpack the archive again")
    return rows


def summary(subset: str, rows: list[dict[str, Any]], path: Path, chosen: bool) -> str:
    """One line on what was written; says so where fewer utterances are there than were published (unless `chosen`)."""
    hours = sum(row["duration"] for row in rows) / 3600
    speakers = len({row["speaker"] for row in rows})
    text = f"{subset}: {len(rows)} utterances, {hours:.2f} h, {speakers} speakers -> {path}"
    if not chosen and subset in ARCHIVES and len(rows) != ARCHIVES[subset].utterances:
        text += f" (a part: {len(rows)} of {ARCHIVES[subset].utterances} utterances)"
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m manifests.librispeech",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("src", metavar="SRC", type=Path, help="folder that holds the subset folders")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder for <subset>.json")
    parser.add_argument("--subsets", metavar="SUBSET", nargs="+", required=True, help="names of subset folders")
    parser.add_argument("--ids", metavar="FILE", type=Path, help="keep only the utterances listed, one id a line")
    parser.add_argument("--relative", action="store_true", help="audio paths relative to DIR instead of absolute")
    parser.add_argument("--workers", metavar="N", type=int, default=1, help="processes (default 1)")
    args = parser.parse_args(argv)
    try:
        ids = read_ids(args.ids) if args.ids else None
        built: dict[str, list[dict[str, Any]]] = {}
        for subset in dict.fromkeys(args.subsets):
            relative_to = args.out if args.relative else None
            built[subset] = build_rows(args.src, subset, ids, args.workers, relative_to)
            if not built[subset]:
                raise CorpusError(f"{args.ids}: none of its ids is in {subset}: leave {subset} out of --subsets")
        # Only when all of them are good is anything written.
        for subset, rows in built.items():
            path = args.out / f"{subset}.json"
            write_manifest(path, rows)
            print(summary(subset, rows, path, ids is not None))
    except (CorpusError, ManifestError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if ids is not None:
        missing = ids.keys() - {row["utterance"] for rows in built.values() for row in rows}
        if missing:
            first = min(missing, key=ids.__getitem__)
            print(
                f"warning: {args.ids}:{ids[first]}: {len(missing)} of {len(ids)} ids are not in {', '.join(built)},"
                f" {first} the first of them: the rest was written",
                file=sys.stderr,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
