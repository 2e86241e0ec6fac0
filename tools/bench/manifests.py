"""Manifest building: utterances a second, ours against lhotse, soundfile, and sox where it is installed.

    python -m tools.bench manifests
    python -m tools.bench manifests --tree .../LibriSpeech --subset train-clean-5 --json bench.json

All contenders read the same warm tree, in turns, in an order that rotates from round to round, so that what else the
machine does meets all of them. Rates are given by the wall clock and by CPU time; the latter is the fairer on a busy
machine. Without --tree a tree of quiet noise is made in a temporary folder: as many distinct files as asked for.
"""

import contextlib
import importlib.util
import io
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from manifests.flac import read_info
from manifests.librispeech import CorpusError, build_rows, find_root, find_subset
from manifests.report import table
from manifests.schema import write_manifest
from tools.bench._common import describe, parser, save

SOX_FILES = 60  # at two processes a file more would take minutes
OURS = "manifests.librispeech"


class Timing(NamedTuple):
    """Seconds of one run over `utterances` utterances: by the clock, and of CPU time with that of child processes."""

    utterances: int
    wall: float
    cpu: float


def make_tree(root: Path, utterances: int, seconds: float = 2.0, a_chapter: int = 40) -> str:
    """Write a native tree of quiet noise under `root`; returns its subset's name."""
    import numpy
    import soundfile

    noise = numpy.random.default_rng(0).normal(scale=0.002, size=round(16000 * (seconds + 1)))
    text = "SO THAT THE FILES ARE AS LONG AS REAL ONES AND THEIR WORDS AS MANY IT'S TEXT WITHOUT A MEANING " * 2
    for start in range(0, utterances, a_chapter):
        speaker, chapter = str(100 + start // a_chapter // 2), str(1000 + start // a_chapter)
        folder = root / "bench" / speaker / chapter
        folder.mkdir(parents=True)
        lines = []
        for number in range(start, min(start + a_chapter, utterances)):
            utterance = f"{speaker}-{chapter}-{number - start:04}"
            # Each of its own length, so that no contender can remember.
            samples = noise[number % 16000 :][: round(seconds * 16000) - number % 997]
            soundfile.write(folder / f"{utterance}.flac", samples, 16000, format="FLAC", subtype="PCM_16")
            lines.append(f"{utterance} {text.strip()}\n")
        (folder / f"{speaker}-{chapter}.trans.txt").write_text("".join(lines))
    return "bench"


def contenders(root: Path, subset: str, flacs: Sequence[str], scratch: Path) -> dict[str, Callable[[], int]]:
    """Name to function; each does its work once and returns over how many utterances."""

    def ours(workers: int) -> int:
        return write_manifest(scratch / "ours.json", build_rows(root, subset, workers=workers))

    def headers() -> int:
        return sum(read_info(path).total_samples > 0 for path in flacs)

    def soundfile_info() -> int:
        import soundfile

        return sum(soundfile.info(path).frames > 0 for path in flacs)

    def lhotse_prepare() -> int:
        from lhotse.recipes import prepare_librispeech

        with tempfile.TemporaryDirectory(dir=scratch) as out, contextlib.redirect_stderr(io.StringIO()):
            made = prepare_librispeech(root, dataset_parts=[subset], output_dir=out, normalize_text="lower")
        return len(made[subset]["supervisions"])

    def sox() -> int:
        # What NeMo's get_librispeech_data.py does for each file: a conversion and a question.
        for path in flacs[:SOX_FILES]:
            wav = str(scratch / "x.wav")
            subprocess.run(["sox", path, wav], check=True)
            subprocess.run(["soxi", "-D", wav], check=True, stdout=subprocess.DEVNULL)
        return len(flacs[:SOX_FILES])

    found: dict[str, Callable[[], int]] = {OURS: lambda: ours(1)}
    if (cores := os.cpu_count() or 1) > 1:
        found[f"{OURS} --workers {cores}"] = lambda: ours(cores)
    found["bare FLAC headers"] = headers
    found["soundfile.info"] = soundfile_info
    if importlib.util.find_spec("lhotse"):
        found["lhotse prepare_librispeech"] = lhotse_prepare
    if shutil.which("sox") and shutil.which("soxi"):
        found["sox and soxi a file"] = sox
    return found


def measure(function: Callable[[], int]) -> Timing:
    """Run it once."""

    def cpu() -> float:
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    wall, before = time.perf_counter(), cpu()
    utterances = function()
    return Timing(utterances, time.perf_counter() - wall, cpu() - before)


def compare(functions: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[Timing]]:
    """`rounds` runs of each, in turns, after one of each that is not counted (imports, caches)."""
    timings: dict[str, list[Timing]] = {name: [] for name in functions}
    names = list(functions)
    for turn in range(-1, rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            timing = measure(functions[name])
            if turn >= 0:
                timings[name].append(timing)
        print(f"round {turn + 1} of {rounds}" if turn >= 0 else "warm-up done", file=sys.stderr, flush=True)
    return timings


def summarise(timings: dict[str, list[Timing]]) -> dict[str, dict[str, float]]:
    """Medians of utterances a second, and how many times faster ours is in CPU time, with the least and the most."""
    summary = {}
    for name, runs in timings.items():
        # In pairs from the same round, which share what the machine was doing.
        ratios = [
            (mine.utterances / mine.cpu) / (theirs.utterances / theirs.cpu)
            for mine, theirs in zip(timings[OURS], runs, strict=True)
        ]
        cpu_rates = [run.utterances / run.cpu for run in runs]
        summary[name] = {
            "wall_utt_per_s": statistics.median(run.utterances / run.wall for run in runs),
            "cpu_utt_per_s": statistics.median(cpu_rates),
            "cpu_utt_per_s_min": min(cpu_rates),
            "cpu_utt_per_s_max": max(cpu_rates),
            "ours_times_faster": statistics.median(ratios),
            "ours_times_faster_min": min(ratios),
            "ours_times_faster_max": max(ratios),
        }
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    options = parser("manifests", __doc__)
    options.add_argument("--utterances", metavar="N", type=int, default=3000, help="files to make (default 3000)")
    options.add_argument("--rounds", metavar="N", type=int, default=5, help="runs of each that count (default 5)")
    options.add_argument("--tree", metavar="SRC", type=Path, help="a tree to read instead of making one")
    options.add_argument("--subset", metavar="NAME", default="train-clean-5", help="which of its subsets")
    argv = list(sys.argv[1:] if argv is None else argv)
    args = options.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        try:
            if args.tree:
                root, subset = find_root(args.tree), args.subset
                find_subset(root, subset)
            else:
                root, subset = scratch / "LibriSpeech", make_tree(scratch / "LibriSpeech", args.utterances)
        except CorpusError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        flacs = sorted(str(path) for path in (root / subset).rglob("*.flac"))
        timings = compare(contenders(root, subset, flacs, scratch), args.rounds)
    summary = summarise(timings)
    rows = [
        [
            name,
            f"{figures['cpu_utt_per_s']:,.0f}",
            f"{figures['cpu_utt_per_s_min']:,.0f} to {figures['cpu_utt_per_s_max']:,.0f}",
            f"{figures['wall_utt_per_s']:,.0f}",
            f"{figures['ours_times_faster']:.2f}",
            f"{figures['ours_times_faster_min']:.2f} to {figures['ours_times_faster_max']:.2f}",
        ]
        for name, figures in summary.items()
    ]
    head = ["", "utt/s of CPU", "least to most", "utt/s by the clock", "ours is faster by", "least to most"]
    remark = (f"{len(flacs)} utterances, {args.rounds} rounds, warm, Python {platform.python_version()}; medians; "
              "how much faster ours is in CPU time, in pairs of a round.")
    print("\n".join([table(head, rows), remark]))
    save(args.json, "manifests", __doc__, argv, describe("CPU", 1), head, rows, args.note, utterances=len(flacs),
         summary=summary, rounds={name: [run._asdict() for run in runs] for name, runs in timings.items()},
         remarks=[remark])
    return 0


if __name__ == "__main__":
    sys.exit(main())
