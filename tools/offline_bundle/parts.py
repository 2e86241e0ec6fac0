"""Files into parts of a given size and back: zip files that any tool opens, with an index of checksums.

A part is a complete zip of its own, so parts can arrive one at a time, in any order, and be unpacked as they come. A
file that crosses the end of a part is cut into pieces, which are joined when all are there. The same files give the
same parts, byte for byte: a part whose checksum has not changed need not be carried again. Standard library only.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from manifests.schema import write_atomic

FORMAT = 1
STATE = ".bundle"  # in the folder that a bundle is unpacked to: its index, and which parts are done
END_BYTES = 22  # of a zip's end record
HEADER_BYTES = 30 + 46  # of a member, in the file and in the directory at its end; its name counts twice more
LEAST_PIECE = 1 << 10  # what is left of a part is not filled with less


class BundleError(RuntimeError):
    """A bundle that cannot be made or used. The message is one line and says what to do."""


class Unpacked(NamedTuple):
    """How far a bundle is: names of parts done before, done now, not found, and messages on damaged ones."""

    before: list[str]
    now: list[str]
    missing: list[str]
    damaged: list[str]

    @property
    def complete(self) -> bool:
        return not (self.missing or self.damaged)


def parse_size(text: str) -> int:
    """Bytes of "45MiB", "16 MB", "1GiB" or a plain number. Raises BundleError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?)(i?)B?\s*", text, re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise BundleError(f"size {text!r}: write it as 45MiB, 16MB or a number of bytes")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMG".index(match[2].upper() or " "))


def show_size(count: float) -> str:
    """12.3 MiB, or 4 KiB below one of these."""
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{-(-count // 1024):.0f} KiB"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class PartWriter:
    """Writes files into OUT/<stem>-001.zip and on, each of at most `part_size` bytes, then OUT/<stem>.json.

    Nothing is under its final name before it is whole; the index comes last, and parts that it does not name are
    removed. The first part can be made runnable: its name then ends in .pyz, and it holds a __main__.py. A file is
    cut where a part ends, so that all parts but the last (and those before a `new_part`) are full.
    """

    def __init__(self, out: Path, stem: str, part_size: int, runnable: bool = False):
        if part_size < 4096:
            raise BundleError(f"parts of {part_size} bytes are too small: give 4 KiB at least, best some MiB")
        self.out, self.stem, self.part_size, self.runnable = out, stem, part_size, runnable
        self.parts: list[dict] = []
        self.joined: dict[str, int] = {}
        self.names: set[str] = set()
        self._zip: zipfile.ZipFile | None = None
        self._used = 0
        out.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, data: Path | bytes) -> None:
        """One file under the relative name `name`. Raises BundleError for one that stands twice or leaves the tree."""
        checked_name(name)
        if name in self.names:
            raise BundleError(f"{name}: stands twice in the bundle")
        self.names.add(name)
        size = len(data) if isinstance(data, bytes) else data.stat().st_size
        overhead = HEADER_BYTES + 2 * len(f"{name}.piece-0000".encode())
        room = self.part_size - END_BYTES - overhead
        if room < LEAST_PIECE:
            raise BundleError(f"{name}: no part of {self.part_size} bytes can hold it: make parts larger")
        left = room if self._zip is None else self.part_size - self._used - overhead
        if size <= left or (left < LEAST_PIECE and size <= room):
            self._put(name, data if isinstance(data, bytes) else data.read_bytes())
            return
        pieces = 0
        with io.BytesIO(data) if isinstance(data, bytes) else open(data, "rb") as file:
            while block := file.read(left if left >= LEAST_PIECE else room):
                pieces += 1
                self._put(f"{name}.piece-{pieces:04d}", block)
                left = self.part_size - self._used - overhead
        self.joined[name] = pieces

    def new_part(self) -> None:
        """What follows starts in a part of its own, so that it stays the same when what is before changes."""
        if self._zip is not None:
            self._close()

    def finish(self, **facts) -> dict:
        """Writes the index with `facts` in it and returns it."""
        self.new_part()
        index = {"format": FORMAT, "stem": self.stem, **facts, "parts": self.parts, "joined": self.joined}
        index["id"] = hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()[:16]
        write_atomic(self.out / f"{self.stem}.json", (json.dumps(index, indent=1) + "\n").encode())
        named = {part["name"] for part in self.parts}
        for path in self.out.iterdir():
            if re.fullmatch(re.escape(self.stem) + r"-\d{3,}\.(zip|pyz)", path.name) and path.name not in named:
                path.unlink()
        return index

    def _put(self, name: str, data: bytes) -> None:
        cost = len(data) + HEADER_BYTES + 2 * len(name.encode())
        if self._zip is not None and self._used + cost > self.part_size:
            self._close()
        if self._zip is None:
            kind = "pyz" if self.runnable and not self.parts else "zip"
            self._name = f"{self.stem}-{len(self.parts) + 1:03d}.{kind}"
            self._path = self.out / f".{self._name}.part"
            self._zip = zipfile.ZipFile(self._path, "w")
            self._used = END_BYTES
            self._files = 0
        # No time of its own: the same content is the same part. Stored: audio, wheels and archives are packed already.
        self._zip.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
        self._used += cost
        self._files += 1

    def _close(self) -> None:
        self._zip.close()
        self._zip = None
        size = self._path.stat().st_size
        part = {"name": self._name, "bytes": size, "sha256": sha256(self._path), "files": self._files}
        os.replace(self._path, self.out / self._name)
        self.parts.append(part)


def checked_name(name: str) -> str:
    """`name` where it is a plain relative path; raises BundleError for one that would leave the folder."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise BundleError(f"{name!r}: not a relative path inside the bundle: pack it again")
    return name


def read_index(folders: Iterable[Path], stem: str | None = None) -> dict:
    """The one index (<stem>.json) in the folders. Raises BundleError where there is none, or several different ones."""
    found: dict[str, tuple[Path, dict]] = {}
    for folder in folders:
        for path in sorted(folder.glob(f"{stem or '*'}.json")) if folder.is_dir() else []:
            try:
                index = json.loads(path.read_text())
            except (ValueError, OSError):
                index = None
            if isinstance(index, dict) and {"format", "stem", "parts", "id"} <= index.keys():
                found[index["id"]] = (path, index)
            elif stem:
                raise BundleError(f"{path}: no index of a bundle, or cut short: bring it again")
    where = ", ".join(map(str, folders))
    if not found:
        raise BundleError(f"{where}: no {stem or 'bundle'}.json there: bring it too, or name its folder with --parts")
    if len(found) > 1:
        paths = ", ".join(str(path) for path, _ in found.values())
        raise BundleError(f"indexes of different bundles: {paths}: leave one, or name its folder with --parts")
    index = next(iter(found.values()))[1]
    if index["format"] != FORMAT:
        raise BundleError(f"bundle of format {index['format']}, this reads {FORMAT}: pack it again")
    return index


def check_part(path: Path, part: dict) -> str:
    """What is wrong with a part's file, in one line; empty where it is as the index says."""
    size = path.stat().st_size
    if size != part["bytes"]:
        return f"{path}: {size} of {part['bytes']} bytes: bring it again"
    if sha256(path) != part["sha256"]:
        return f"{path}: damaged, its checksum is not {part['sha256'][:12]}...: bring it again"
    return ""


def unpack(index: dict, folders: list[Path], dest: Path, report=lambda line: None) -> Unpacked:
    """Unpacks the parts that are in `folders` and not done yet into `dest`; what is done already is left alone.

    Each file gets its name when it is whole, and a part counts as done when all its files have theirs, so an
    interrupted call is simply made again.
    """
    done = dest / STATE / "done"
    done.mkdir(parents=True, exist_ok=True)
    result = Unpacked([], [], [], [])
    for part in index["parts"]:
        stamp = done / part["sha256"]
        if stamp.exists():
            result.before.append(part["name"])
            continue
        paths = [folder / part["name"] for folder in folders if (folder / part["name"]).is_file()]
        if not paths:
            result.missing.append(part["name"])
            continue
        problems = [check_part(path, part) for path in paths]
        if "" not in problems:
            result.damaged.append(problems[0])
            continue
        _extract(paths[problems.index("")], dest)
        stamp.touch()
        result.now.append(part["name"])
        report(f"{part['name']}: {part['files']} files, {show_size(part['bytes'])}, checksum right")
    if result.complete:
        for name, pieces in index["joined"].items():
            _join(dest, name, pieces)
        write_atomic(dest / STATE / "index.json", (json.dumps(index, indent=1) + "\n").encode())
        current = {part["sha256"] for part in index["parts"]}
        for stamp in done.iterdir():  # of an earlier bundle, whose files may have been replaced by this one's
            if stamp.name not in current:
                stamp.unlink()
    return result


def _extract(path: Path, dest: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            target = dest / checked_name(member.filename)
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f".{target.name}.part")
            with archive.open(member) as source, open(part, "wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
            os.replace(part, target)


def _join(dest: Path, name: str, pieces: int) -> None:
    paths = [dest / f"{name}.piece-{number:04d}" for number in range(1, pieces + 1)]
    if not all(path.is_file() for path in paths):
        if (dest / name).is_file():  # joined before, perhaps cut while it cleaned up
            for path in paths:
                path.unlink(missing_ok=True)
            return
        raise BundleError(f"{dest / name}: a piece is gone: remove {dest / STATE} and unpack again")
    part = dest / f"{name}.part"
    with open(part, "wb") as file:
        for path in paths:
            with open(path, "rb") as source:
                shutil.copyfileobj(source, file, 1 << 20)
    os.replace(part, dest / name)
    for path in reversed(paths):  # the first piece goes last: cut here, the pieces are plainly not all there
        path.unlink()
