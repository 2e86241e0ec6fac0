"""Which utterance goes into which shard, and under what name: from the manifest alone, the same on every machine."""

import hashlib
import json
import os
import random
import re
from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any

from manifests.schema import ManifestError, parse_line, show
from manifests.shards_format import is_sharded

# NeMo takes a name that ends so for a part of another file.
_PART_OF_A_FILE = re.compile(r"-sub\d+(\.\w+)?$")
_EXTENSION = re.compile(r"\.[A-Za-z0-9]{1,8}$")


class Plan:
    """The utterances of some manifests and their shards. Rows are kept as their lines: a million take 0.4 GB.

    `utterances` and `seconds` in all; `shards` how many; `hours` and `seed` as asked for; `fingerprint` is of the
    manifests' contents and the settings: two plans with the same one write the same bytes, given the same audio.
    """

    def __init__(self, manifests: Sequence[str | os.PathLike], hours: float, seed: int | None):
        self.hours, self.seed = float(hours), seed
        self.manifests = [os.fspath(path) for path in manifests]
        self.lines: list[bytes] = []
        self.durations = array("d")
        self._origin = array("q")  # manifest and line of each row, in one number
        self._names: dict[int, str] = {}  # of the rows whose audio cannot keep its name
        digest = hashlib.sha256(json.dumps([1, self.hours, seed]).encode())
        names: list[str] = []
        for at, path in enumerate(self.manifests):
            try:
                with open(path, "rb") as file:
                    for number, raw in enumerate(file, 1):
                        digest.update(raw)
                        if not raw.isspace():
                            names.append(self._add(at, number, raw))
            except OSError as error:
                raise ManifestError(f"{path}: cannot read the manifest: {error.strerror or error}") from error
            digest.update(b"\0")
        if not self.lines:
            raise ManifestError(f"{self.manifests[0]}:1: holds no utterance: build it again")
        self.fingerprint = digest.hexdigest()
        self.utterances = len(self.lines)
        self._rename(names)
        self._deal()

    def _add(self, at: int, number: int, raw: bytes) -> str:
        """Keeps a row; returns the name of its audio file."""
        where = f"{self.manifests[at]}:{number}"
        line = parse_line(number, raw)
        if line.problems:
            raise ManifestError(f"{where}: {line.problems[0].message}")
        if is_sharded(line.row) or "shard_id" in line.row:
            raise ManifestError(f"{where}: shard_id is {show(line.row.get('shard_id'))}: the row is of shards already: "
                                "give the manifest that they were made of")
        if "offset" in line.row:
            raise ManifestError(f"{where}: offset is {show(line.row['offset'])}: shards take whole files; cut the "
                                "recording into utterances first")
        self.lines.append(raw.strip())
        self.durations.append(line.row["duration"])
        self._origin.append(at << 40 | number)
        return os.path.basename(line.row["audio_filepath"])

    def _rename(self, names: list[str]) -> None:
        """Gives a name of our own to audio whose own is not unique, too long for a tar header, or misread by NeMo."""
        counts = Counter(names)
        for index, name in enumerate(names):
            if counts[name] == 1 and name.isascii() and name.isprintable() and len(name) <= 100:
                if name and not _PART_OF_A_FILE.search(name):
                    continue
            extension = _EXTENSION.search(name)
            new = f"row{index:09}{extension.group() if extension else ''}"
            while counts[new]:
                new = f"_{new}"
            self._names[index] = new

    def _deal(self) -> None:
        order = list(range(self.utterances))
        if self.seed is not None:
            random.Random(self.seed).shuffle(order)
        self.order = array("q", order)
        self.seconds = sum(self.durations)
        share = self.seconds / max(-(-self.seconds // (3600 * self.hours)), 1)
        self._starts, before, last = [], 0.0, -1
        for position, index in enumerate(self.order):
            if int(before / share) > last:
                self._starts.append(position)
                last = int(before / share)
            before += self.durations[index]
        self.shards = len(self._starts)
        self._starts.append(self.utterances)

    def rows_of(self, shard: int) -> array:
        """Indices of a shard's rows, in its order."""
        return self.order[self._starts[shard] : self._starts[shard + 1]]

    def row(self, index: int) -> dict[str, Any]:
        """A row as the manifest has it."""
        return json.loads(self.lines[index])

    def where(self, index: int) -> str:
        """`manifest:line` of a row."""
        origin = self._origin[index]
        return f"{self.manifests[origin >> 40]}:{origin & (1 << 40) - 1}"

    def shard_row(self, index: int) -> dict[str, Any]:
        """A row as shards have it, but for what the tar and the audio say (`sampling_rate`, `shard_id`, place)."""
        row = self.row(index)
        own = row["audio_filepath"]
        row["audio_filepath"] = self._names.get(index) or os.path.basename(own)
        if index in self._names:
            row.setdefault("utterance", os.path.splitext(os.path.basename(own))[0])
        return row


def make_plan(manifests: Sequence[str | os.PathLike], hours: float, seed: int | None) -> Plan:
    """The plan for `manifests`, taken as one. Raises ManifestError, with file and line, where a row cannot be used."""
    return Plan(manifests, hours, seed)
