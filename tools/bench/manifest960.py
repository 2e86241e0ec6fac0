"""960 hours of manifest: seconds and memory of every step before training, at LibriSpeech's size and at a million rows.

    python -m tools.bench manifest960
    python -m tools.bench manifest960 --rows 281241 1000000 --source data/librispeech_8h/train.json

A tree like LibriSpeech's is simulated: as many utterances, speakers and chapters as asked for, each utterance a link to
one of the real files that --source names, with that file's words. So durations, texts and headers are real ones drawn
with replacement (a few thousand distinct), and audio of any utterance can be loaded; what it cannot show is the cost of
a cold disk, since the few real files lie in memory. Each step runs in a process of its own; its peak is the kernel's.

The steps are those of a run: the builder over the tree, the reader, the validator (with all headers opened too), the
plan of shards and the writing of a first part of them, the recipe's loader up to its first batch, 50 batches as one
device of eight draws them, the same with audio, and the sampler's way through a whole epoch, which is what resuming at
its end takes. Seconds are of CPU time, by the clock in brackets; NeMo's import, which every step of the loader needs,
is a row of its own, and its memory is in their peaks.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from manifests.librispeech import build_rows
from manifests.schema import ManifestError, read_manifest, resolve_audio, write_manifest
from tools.bench._common import ROOT, BenchError, describe, guarded, parser, rss, save, set_up

LIBRISPEECH = 281241  # utterances in train-clean-100, train-clean-360 and train-other-500
A_CHAPTER, A_SPEAKER = 51, 120  # utterances; LibriSpeech's means
SUBSET = "train-simulated"
STEPS, DEVICES = 50, 8
SHARDED = 4000  # utterances really written as shards


# ---- steps; each returns what it has to say of its work ---------------------------------------------------------


def simulate(folder: Path, rows: int, source: str) -> dict:
    """A native tree of `rows` utterances: links to the audio of `source`, and its words in capitals."""
    known = [(row, resolve_audio(row, source)) for row in read_manifest(source)]
    known = [(row["text"].upper(), os.path.abspath(path)) for row, path in known if path.endswith(".flac")]
    draw = random.Random(0)
    for first in range(0, rows, A_CHAPTER):
        speaker, chapter = 1 + first // A_SPEAKER, 100000 + first // A_CHAPTER
        place = folder / "LibriSpeech" / SUBSET / str(speaker) / str(chapter)
        place.mkdir(parents=True)
        lines = []
        for number in range(min(A_CHAPTER, rows - first)):
            text, audio = draw.choice(known)
            name = f"{speaker}-{chapter}-{number:04}"
            os.symlink(audio, place / f"{name}.flac")
            lines.append(f"{name} {text}\n")
        (place / f"{speaker}-{chapter}.trans.txt").write_text("".join(lines))
    return {"rows": rows, "distinct": len({path for _, path in known})}


def draw(folder: Path, rows: int, source: str) -> dict:
    """A manifest of `rows` utterances without a tree: their audio is that of the real ones."""
    known = [{**row, "audio_filepath": os.path.abspath(resolve_audio(row, source))} for row in read_manifest(source)]
    chance = random.Random(0)
    drawn = ({**chance.choice(known), "utterance": f"drawn-{number}"} for number in range(rows))
    return {"rows": write_manifest(folder / "train.json", drawn), "distinct": len(known)}


def build(folder: Path) -> dict:
    rows = build_rows(folder / "LibriSpeech", SUBSET)
    count = write_manifest(folder / "train.json", rows)
    return {"rows": count, "hours": round(sum(row["duration"] for row in rows) / 3600, 1),
            "bytes": (folder / "train.json").stat().st_size}


def read(folder: Path) -> dict:
    return {"rows": len(read_manifest(folder / "train.json"))}


def validate(folder: Path, audio: bool = False) -> dict:
    from manifests.validate import validate as check

    report = check(train=[folder / "train.json"], audio=audio)
    errors = sum(finding.severity == "error" for finding in report.findings)
    if errors:
        raise BenchError(f"{errors} errors in the simulated manifest, first {report.findings[0]}")
    return {"rows": report.files[0].lines, "warnings": len(report.findings)}


def plan(folder: Path) -> dict:
    from manifests.shards_plan import make_plan

    made = make_plan([folder / "train.json"], hours=4.0, seed=0)
    return {"rows": made.utterances, "shards": made.shards}


def write_shards(folder: Path) -> dict:
    """The first utterances' shards only: all of them would take 60 GB."""
    from manifests.shards import write_shards as write

    with open(folder / "train.json", "rb") as file:
        lines = [line for line, _ in zip(file, range(SHARDED))]
    (folder / "part.json").write_bytes(b"".join(lines))
    record = write([folder / "part.json"], folder / "shards", hours=1.0)
    return {"rows": record["utterances"], "shards": len(record["shards"]),
            "bytes": sum(shard["tar_bytes"] for shard in record["shards"])}


def verify_shards(folder: Path) -> dict:
    from manifests.shards import verify_shards as verify

    record, problems = verify([folder / "part.json"], folder / "shards")
    if problems:
        raise BenchError(f"shards: {problems[0]}")
    return {"rows": record["utterances"], "bytes": sum(shard["tar_bytes"] for shard in record["shards"])}


def _loader(folder: Path, manifest: str = "train.json"):
    from omegaconf import OmegaConf

    from recipes.config import compose
    from recipes.data import CharEncoder, lhotse_loader
    from recipes.lengths import split_global_batch
    from recipes.quiet import quiet_nemo

    path = folder / manifest
    cfg = compose("conformer", ["corpus=librispeech_960h", f"corpus.train={path}", f"corpus.validation={path}"])
    cfg.model.train_ds.batch_duration = split_global_batch(cfg.training.global_batch_seconds, DEVICES, 1)
    cfg.model.train_ds.num_workers = 0
    train = OmegaConf.to_container(cfg.model.train_ds, resolve=True)
    quiet_nemo()
    return lhotse_loader(train, CharEncoder(cfg.model.labels), 0, DEVICES)


def _summary(batches: Iterable) -> dict:
    """Of batches of cuts: utterances, seconds of speech, and how much of the padded batch is padding."""
    durations = [[cut.duration for cut in batch] for batch in batches]
    padded = sum(len(one) * max(one) for one in durations)
    speech = sum(map(sum, durations))
    return {"batches": len(durations), "rows": sum(map(len, durations)), "seconds": round(speech),
            "padding": round(1 - speech / padded, 4)}


def first_batch(folder: Path) -> dict:
    return _summary(islice(_loader(folder).sampler, 1))


def steps(folder: Path) -> dict:
    return _summary(islice(_loader(folder).sampler, STEPS))


def steps_with_audio(folder: Path) -> dict:
    samples = rows = batches = 0
    for _, lengths, _, _, ids in islice(_loader(folder), STEPS):
        samples, rows, batches = samples + int(lengths.sum()), rows + len(ids), batches + 1
    return {"batches": batches, "rows": rows, "seconds": round(samples / 16000)}


def epoch(folder: Path) -> dict:
    count = sum(1 for _ in _loader(folder).sampler)
    return {"batches": count}


def imports(folder: Path) -> dict:
    import nemo.collections.asr  # noqa: F401
    from nemo.collections.common.data.lhotse import get_lhotse_dataloader_from_config  # noqa: F401

    return {}


PARTS = {
    "draw": "manifest drawn from real rows, and written",
    "simulate": "simulated tree, by links",
    "build": "builder: tree to manifest, all headers read",
    "read": "reader: manifest to rows",
    "validate": "validator",
    "validate_audio": "validator with all headers opened",
    "plan": "plan of the shards",
    "write_shards": f"shards of the first {SHARDED:,} rows written",
    "verify_shards": "the same verified",
    "imports": "import of NeMo alone",
    "first_batch": "loader up to the first batch",
    "steps": f"{STEPS} batches of one device of {DEVICES}",
    "steps_with_audio": f"{STEPS} batches with audio",
    "epoch": f"the sampler's whole epoch, one device of {DEVICES}",
}


# With and without a tree of links: rows that share audio are an error to the validator.
BUILT = [part for part in PARTS if part != "draw"]
DRAWN = ["draw", "read", "plan", "imports", "first_batch", "steps", "steps_with_audio", "epoch"]


def run_part(part: str, folder: Path, rows: int, source: str) -> dict:
    """One step in this process: its own figures, seconds by the clock and of CPU time, MB at the peak."""
    if part in ("imports", "first_batch", "steps", "steps_with_audio", "epoch"):
        set_up()
        if part != "imports":
            imports(folder)
    begin, cpu = time.perf_counter(), time.process_time()
    if part in ("simulate", "draw"):
        said = globals()[part](folder, rows, source)
    elif part == "validate_audio":
        said = validate(folder, audio=True)
    else:
        said = globals()[part](folder)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    return {"part": part, "wall": round(seconds, 2), "cpu": round(cpu, 2), "peak_mb": round(rss("VmHWM") / 1e6), **said}


def _shown(part: dict) -> str:
    words, cpu = [], max(part["cpu"], 0.01)
    if "hours" in part:
        words.append(f"{part['hours']:,} h, {part['bytes'] / 1e6:.0f} MB of manifest")
    elif "bytes" in part:
        rates = part["rows"] / cpu, part["bytes"] / cpu / 1e6
        words.append(f"{rates[0]:,.0f} utterances and {rates[1]:,.0f} MB a second")
    elif "rows" in part and "batches" not in part:
        words.append(f"{part['rows'] / cpu:,.0f} rows a second")
    if "shards" in part:
        words.append(f"{part['shards']} shards")
    if "batches" in part:
        words.append(f"{part['batches']:,} batches")
    if "seconds" in part:
        words.append(f"{part['seconds']:,} s of speech")
    if "padding" in part:
        words.append(f"{part['padding']:.1%} padding")
    return ", ".join(words)


def measure(args: argparse.Namespace, argv: Sequence[str]) -> None:
    found = []
    for rows in args.rows:
        folder = Path(tempfile.mkdtemp(dir=args.scratch))
        try:
            for part in DRAWN if args.drawn else BUILT:
                if part in args.skip:
                    continue
                command = [sys.executable, "-m", "tools.bench", "manifest960", "--part", part, "--folder", str(folder),
                           "--rows", str(rows), "--source", args.source]
                done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
                if done.returncode:
                    raise BenchError(f"{part} at {rows} rows ended with status {done.returncode}")
                one = {"of": rows, **json.loads(done.stdout.splitlines()[-1])}
                found.append(one)
                print(f"{rows:>9,}  {PARTS[part]:48}  {one['cpu']:8.1f} s ({one['wall']:.1f})  {one['peak_mb']:6,} MB  "
                      f"{_shown(one)}", flush=True)
                _save(args, argv, found)
        finally:
            shutil.rmtree(folder)


def _save(args: argparse.Namespace, argv: Sequence[str], found: list[dict]) -> None:
    """After each step, so that what a cut leaves is not lost."""
    rows = [
        [f"{one['of']:,}", PARTS[one["part"]], f"{one['cpu']:.1f} ({one['wall']:.1f})", f"{one['peak_mb']:,}",
         _shown(one)]
        for one in found
    ]
    head = ["rows", "step", "seconds of CPU (by the clock)", "peak MB", ""]
    save(args.json, "manifest960", __doc__, argv, describe("CPU", 1), head, rows, args.note, parts=found)


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parser("manifest960", __doc__)
    options.add_argument("--rows", metavar="N", type=int, nargs="+", default=[LIBRISPEECH, 1_000_000],
                         help=f"sizes (default {LIBRISPEECH} 1000000)")
    options.add_argument("--source", metavar="MANIFEST", default="data/librispeech_8h/train.json",
                         help="real utterances to draw from (default data/librispeech_8h/train.json)")
    options.add_argument("--drawn", action="store_true", help="draw a manifest; no tree, builder, validator and shards")
    options.add_argument("--skip", metavar="STEP", nargs="+", default=[], choices=list(PARTS),
                         help=f"steps to leave out: {', '.join(PARTS)}")
    options.add_argument("--scratch", metavar="DIR", type=Path, help="where the tree is made (default: temporary)")
    options.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = options.parse_args(argv)

    def work() -> None:
        try:
            if args.part:
                print(json.dumps(run_part(args.part, args.folder, args.rows[0], args.source)))
            else:
                absent = [p for p in (resolve_audio(row, args.source) for row in read_manifest(args.source)[:50])
                          if not os.path.isfile(p)]
                if absent:
                    raise BenchError(f"{args.source}: no audio at {absent[0]}: give another --source")
                measure(args, argv)
        except ManifestError as error:
            raise BenchError(f"{error}; give another --source") from error

    return guarded("manifest960", work)


if __name__ == "__main__":
    sys.exit(main())
