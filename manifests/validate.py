"""Check manifests before training does.

    python -m manifests.validate data/mini/train.json data/mini/test.json
    python -m manifests.validate --train data/mini/train.json --test data/mini/test.json --audio --json report.json

Every line is checked for what NeMo would refuse late or, worse, take without a word: broken JSON, missing fields, wrong
types, durations that are none, missing audio, empty text, characters that the labels lack (NeMo drops them), the same
audio twice, in training and test as well, speech too fast or slow to be true, and texts longer than CTC can align.
With --audio each file's header is opened too: duration, sampling rate, channels, and whether the file is whole.
A name with train in it, or with dev, test, eval or valid, says what a manifest is for; of other names --train and
--test do. Audio or an id that training and test share is an error, between manifests of unknown use a warning.

Exit code: 0 nothing or warnings, 1 errors, 2 a manifest that cannot be read.
"""

import argparse
import math
import os
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from manifests.audio import AudioError, read_header
from manifests.report import FileSummary, Finding, Report
from manifests.schema import LABELS, Line, ManifestError, resolve_audio, scan_manifest, show
from manifests.shards_format import is_sharded
from manifests.text import normalize

DURATION_TOLERANCE = 0.01  # seconds: what rounding to two decimals may do
SHORTEST = 0.1  # seconds
FASTEST = 40.0  # characters a second: nobody speaks at twice the rate of an auctioneer
TRAIN_NAMES = {"train", "training"}
TEST_NAMES = {"dev", "test", "eval", "val", "valid", "validation"}
_REPEATS = re.compile(r"(.)(?=\1)", re.DOTALL)

PathLike = str | os.PathLike


def ctc_frames_needed(text: str) -> int:
    """Output frames that CTC takes to emit `text` by characters: one each, and a blank between two of the same."""
    return len(text) + len(_REPEATS.findall(text))


def role_by_name(path: PathLike) -> str:
    """"train" or "test" (dev, eval, valid as well) by the words of a manifest's file name; "" for neither or both."""
    words = set(re.split("[^a-z]+", os.path.splitext(os.path.basename(path))[0].lower()))
    train, test = bool(words & TRAIN_NAMES), bool(words & TEST_NAMES)
    return "" if train == test else "train" if train else "test"


def validate(
    paths: Iterable[PathLike] = (),
    labels: Iterable[str] | None = LABELS,
    audio: bool | Callable[[str], bool] = False,
    *,
    train: Iterable[PathLike] = (),
    test: Iterable[PathLike] = (),
    sampling_rate: int = 16000,
    frames_per_second: float = 25.0,
    progress: bool = False,
    scan: Callable[..., Iterator[Line]] = scan_manifest,
) -> Report:
    """Check manifests, one by one and against each other.

    Args:
        paths: manifests whose role their names tell (role_by_name), or none: what two such share is a warning.
        labels: characters the model can write; None (BPE) skips that check.
        audio: open every audio file's header; or a function of the manifest's path, asked at each line whether its
            audio is looked at.
        train, test: manifests by role; audio or ids that both hold are errors.
        sampling_rate: the recipe's, in Hz.
        frames_per_second: output frames of the model, 25 for a subsampling of 4 at 10 ms; 0 skips that check.
        progress: show a bar on a terminal.
        scan: reads the lines of a manifest, as scan_manifest does.

    Returns:
        Report: figures and findings. Bad manifests are findings too: nothing is raised for what stands in the files.
    """
    checker = _Checker(labels, audio, sampling_rate, frames_per_second, progress, scan)
    roles: dict[str, str] = {}
    for role, group in (("", paths), ("train", train), ("test", test)):
        for path in group:
            path = os.path.normpath(path)
            # A file named once plainly and once by role has that role.
            if role and roles.get(path, role) not in ("", role):
                raise ValueError(f"{path}: given both as train and as test: one manifest cannot be both")
            roles[path] = role or roles.get(path, "")
    roles = {path: role or role_by_name(path) for path, role in roles.items()}
    for path in roles:
        checker.check_file(path)
    checker.check_shared(roles)
    return checker.report


class _Checker:
    """Collects one Report over some files."""

    def __init__(
        self, labels: Iterable[str] | None, audio: bool | Callable[[str], bool], sampling_rate: int,
        frames_per_second: float, progress: bool, scan: Callable[..., Iterator[Line]],
    ):
        self.labels = None if labels is None else frozenset(labels)
        self.audio = audio
        self.scan = scan
        self.sampling_rate = sampling_rate
        self.frames_per_second = frames_per_second
        self.progress = progress
        self.report = Report(frames_per_second=frames_per_second)
        # Where each key was first seen, a dict a file: {kind: {path of manifest: {key: line}}}.
        self.seen: dict[str, dict[str, dict[Any, int]]] = {"audio": {}, "id": {}, "text": {}}
        # The manifest in hand.
        self.path = ""
        self.summary = FileSummary("")
        self.rates: list[tuple[int, float]] = []  # (line, characters a second)

    def add(self, severity: str, code: str, line: int, message: str, value: Any = "") -> None:
        self.report.findings.append(Finding(severity, code, self.path, line, message, str(value)))

    def check_file(self, path: str) -> None:
        self.path, self.summary, self.rates = path, FileSummary(path), []
        self.report.files.append(self.summary)
        for kind in self.seen.values():
            kind[path] = {}
        try:
            lines = self.scan(path, on_blank=self._blank)
            if self.audio and self.progress:
                from tqdm import tqdm

                lines = tqdm(lines, desc=f"audio of {os.path.basename(path)}", unit=" utt", disable=None)
            number = 0
            for line in lines:
                number = line.number
                self._check_line(line)
            if not number:
                self.add("error", "empty_manifest", 1, "holds no utterance: build it again")
        except ManifestError as error:
            self.add("error", "unreadable", 0, str(error).removeprefix(f"{path}: "))
        self._check_rates()

    def _blank(self, number: int) -> None:
        self.add("error", "blank_line", number, "is blank: remove it, lhotse's loader stops here")

    def _check_line(self, line: Line) -> None:
        self.summary.lines += line.row is not None
        for problem in line.problems:
            self.add("error", problem.code, line.number, problem.message, problem.value)
        row = line.row
        if row is None:
            return
        # What is broken is told once and kept out of all that follows.
        broken = {problem.field for problem in line.problems}
        good = {name: value for name, value in row.items() if name not in broken}
        if "speaker" in good:
            self.summary.speakers.add(str(good["speaker"]))
        if "duration" in good:
            self.summary.durations.append(good["duration"])
            if good["duration"] < SHORTEST:
                message = f"duration {good['duration']} s is under {SHORTEST} s: drop it"
                self.add("warning", "too_short", line.number, message, good["duration"])
        if good.get("sampling_rate", self.sampling_rate) != self.sampling_rate:
            rate = good["sampling_rate"]
            message = f"sampling_rate is {rate}, the recipe's is {self.sampling_rate}: resample the audio"
            self.add("warning", "other_rate", line.number, message, rate)
        if "audio_filepath" in good:
            self._check_audio(line.number, good)
        if "utterance" in good:
            self._check_twice("id", line.number, str(good["utterance"]), show(good["utterance"]))
        if "text" in good:
            self._check_text(line.number, good["text"], good.get("duration"))

    def _check_twice(self, kind: str, number: int, key: Any, shown: str) -> None:
        first = self.seen[kind][self.path].setdefault(key, number)
        if first != number:
            message = f"{kind} {shown} stands on line {first} already: drop one"
            self.add("error", f"duplicate_{kind}", number, message, shown)

    def _check_text(self, number: int, text: str, duration: float | None) -> None:
        summary = self.summary
        if not text.strip():
            message = f"text is {show(text)}: drop the line or give its words"
            self.add("error", "empty_text", number, message, show(text))
            return
        self.seen["text"][self.path].setdefault(normalize(text), number)
        summary.characters.update(text)
        summary.words.update(text.split())
        if text != " ".join(text.split()):
            message = f"text has white space at an end or doubled: {show(text)}: use single spaces"
            self.add("warning", "spaces", number, message, show(text))
        if self.labels is not None and (outside := set(text) - self.labels):
            self._check_labels(number, text, outside)
        if duration:
            summary.characters_per_second.append(len(text) / duration)
            self.rates.append((number, len(text) / duration))
            need = ctc_frames_needed(text)
            summary.ctc_frames_per_second.append(need / duration)
            if self.frames_per_second and need > duration * self.frames_per_second:
                message = (
                    f"{len(text)} characters take {need} CTC frames, {duration:.2f} s have"
                    f" {int(duration * self.frames_per_second)} at {self.frames_per_second:g} frames/s:"
                    " drop it or subsample less"
                )
                self.add("warning", "ctc_too_long", number, message, f"{need / duration:.1f}")

    def _check_labels(self, number: int, text: str, outside: set[str]) -> None:
        counts = Counter(text)
        for char in outside:
            entry = self.report.outside.setdefault(
                char, {"count": 0, "utterances": 0, "first": f"{self.path}:{number}"}
            )
            entry["count"] += counts[char]
            entry["utterances"] += 1
        upper = {char for char in outside if char.lower() in self.labels}
        for code, chars, advice in (
            ("upper_case", upper, "make the text lower case"),
            ("outside_labels", outside - upper, "spell it with the labels or drop the line"),
        ):
            if chars:
                shown = show("".join(sorted(chars)))
                total = sum(counts[char] for char in chars)
                what = "capitals" if code == "upper_case" else "characters outside the labels"
                self.add("error", code, number, f"{total} {what} ({shown}) in {show(text)}: {advice}", shown)

    def _check_audio(self, number: int, row: dict[str, Any]) -> None:
        path = resolve_audio(row, self.path)
        if not os.path.isabs(row["audio_filepath"]):
            path = os.path.normpath(path)
        # Parts of one recording are different utterances.
        self._check_twice("audio", number, (path, row.get("offset") or 0), show(row["audio_filepath"], 200))
        if callable(self.audio) and not self.audio(self.path):
            return
        shard = is_sharded(row)
        try:
            exists = os.path.isfile(os.path.dirname(path) if shard else path)
        except ValueError:
            exists = False
        if not exists:
            message = f"no audio at {path}: mend the path or build the manifest again"
            self.add("error", "missing_audio", number, message, path)
        elif self.audio and not shard:  # headers were read when the shards were written; --verify compares them
            self._check_header(number, row, path)

    def _check_header(self, number: int, row: dict[str, Any], path: str) -> None:
        try:
            header = read_header(path)
        except AudioError as error:
            self.add("error", "broken_audio", number, str(error), path)
            return
        if header.channels != 1:
            message = f"{path} has {header.channels} channels: mix it down to one"
            self.add("error", "not_mono", number, message, header.channels)
        rate = row.get("sampling_rate")
        if rate is not None and rate != header.sampling_rate:
            message = f"sampling_rate is {rate}, {path} has {header.sampling_rate}: build the manifest again"
            self.add("error", "rate_mismatch", number, message, header.sampling_rate)
        elif rate is None and header.sampling_rate != self.sampling_rate:
            message = f"{path} has {header.sampling_rate} Hz, the recipe {self.sampling_rate}: resample the audio"
            self.add("warning", "other_rate", number, message, header.sampling_rate)
        if "duration" in row:
            offset = row.get("offset")
            end = row["duration"] + (offset or 0)
            # A part of a file need not reach its end; a whole one must.
            if end > header.duration + DURATION_TOLERANCE or (
                offset is None and end < header.duration - DURATION_TOLERANCE
            ):
                at = f" from {offset} s" if offset else ""
                message = f"duration is {row['duration']} s{at}, {path} has {header.duration:.3f} s: build it again"
                self.add("error", "duration_mismatch", number, message, f"{header.duration:.3f}")

    def _check_rates(self) -> None:
        """Characters a second far from the rest of the file, by the median absolute deviation of their logarithms."""
        logs = [math.log(rate) for _, rate in self.rates]
        middle = statistics.median(logs) if logs else 0.0
        spread = statistics.median(abs(log - middle) for log in logs) / 0.6745 if len(logs) >= 20 else 0.0
        for (number, rate), log in zip(self.rates, logs, strict=True):
            # Five deviations, and half as much again as the median: files of even speech have next to no deviation.
            odd = spread > 0 and abs(log - middle) > max(5 * spread, math.log(1.5))
            if odd or rate > FASTEST:
                message = f"{rate:.1f} characters a second, the median here is {math.exp(middle):.1f}: listen to it"
                self.add("warning", "speech_rate", number, message, f"{rate:.1f}")

    def check_shared(self, roles: dict[str, str]) -> None:
        """What more than one manifest holds. Training and test must share no audio; other pairs are worth a warning."""
        paths = sorted(roles, key=lambda path: ["train", "", "test"].index(roles[path]))
        for kind, files in self.seen.items():
            for at, second in enumerate(paths):
                for first in paths[:at]:
                    leak = (roles[first], roles[second]) == ("train", "test")
                    # The same words in two training sets say nothing.
                    if kind == "text" and not leak and (roles[first] or roles[second]):
                        continue
                    severity = "error" if leak and kind != "text" else "warning"
                    self.path = second
                    for key in files[second].keys() & files[first].keys():
                        name = key[0] if kind == "audio" else key
                        message = f"{kind} {show(name, 200)} is in {first}:{files[first][key]} too: drop one"
                        self.add(severity, f"shared_{kind}", files[second][key], message, show(name, 200))
        order = {path: at for at, path in enumerate(roles)}
        self.report.findings.sort(key=lambda finding: (order[finding.file], finding.line))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m manifests.validate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", metavar="FILE", nargs="*", help="manifests")
    parser.add_argument("--train", metavar="FILE", nargs="+", default=[], help="manifests used for training")
    parser.add_argument("--test", metavar="FILE", nargs="+", default=[], help="manifests that must share none of it")
    parser.add_argument("--audio", action="store_true", help="open the audio's headers too")
    parser.add_argument(
        "--labels",
        metavar="CHARACTERS",
        default="".join(LABELS),
        help="characters a model can write (default: space, a-z, '); '' for any, as with BPE",
    )
    parser.add_argument("--sampling-rate", metavar="HZ", type=int, default=16000, help="the recipe's (default 16000)")
    parser.add_argument(
        "--frames-per-second",
        metavar="N",
        type=float,
        default=25.0,
        help="a model's output frames (default 25; 0: any)",
    )
    parser.add_argument("--show", metavar="N", type=int, default=5, help="findings printed of each kind (default 5)")
    parser.add_argument("--json", metavar="OUT", help="save figures and all findings as JSON")
    args = parser.parse_args(argv)
    # Texts and file names can hold what a terminal's encoding cannot.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    if not (args.files or args.train or args.test):
        parser.error("no manifest given: name at least one FILE")
    try:
        report = validate(
            args.files,
            args.labels or None,
            args.audio,
            train=args.train,
            test=args.test,
            sampling_rate=args.sampling_rate,
            frames_per_second=args.frames_per_second,
            progress=True,
        )
        if args.json:
            report.save(args.json)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report.text(args.show))
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
