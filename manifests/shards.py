"""A manifest and its audio to shards: some hundred tar files in place of some hundred thousand small ones.

    python -m manifests.shards data/librispeech_960h/train.json --out data/librispeech_960h/shards --workers 8
    python -m manifests.shards data/librispeech_960h/train.json --out data/librispeech_960h/shards --verify
    python -m recipes.train --config-name conformer corpus=librispeech_960h \\
        corpus.train=data/librispeech_960h/shards/tarred_audio_manifest.json

What is written is NeMo's tarred data set (manifests/shards_format.py), and not Lhotse Shar, because: it is made of
plain tar and JSON lines, so neither lhotse nor torch is needed to write it; its rows are manifest rows, which every
tool here and NeMo's own read; the audio files go in as they are, byte for byte. NeMo, and lhotse on Shar, read both as
an endless stream. A tar that is not compressed can be read at any place as well: our rows say where, so the recipes
take shards like single files, with the same batches, epochs that end, and resuming in the middle of one.

Utterances are dealt to shards in an order drawn from --seed, since a run shuffles over a few ten thousand rows only and
LibriSpeech's manifests stand by subset and speaker; --keep-order keeps the manifest's order.

The same bytes come out whatever the number of workers. A run that was killed goes on when the command is given again:
a shard has its final name only when it is whole and on the disk. Each file is checked on its way (mono, whole, of the
manifest's duration), and each problem is one line with the manifest's file and line.

Exit code: 0 done, 1 errors, 2 usage, 130 stopped.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from manifests.schema import ManifestError, resolve_audio, show, write_atomic
from manifests.shards_format import COMBINED, RECORD, ShardError, file_sha256, manifest_name, tar_name
from manifests.shards_plan import Plan, make_plan
from manifests.shards_work import run_workers, verify_shard, write_shard

WORK = ".unfinished"
MAX_SHOWN = 20


def write_shards(
    manifests: Sequence[str | os.PathLike], out: str | os.PathLike, hours: float = 4.0, seed: int | None = 0,
    workers: int = 1, progress: bool = False,
) -> dict[str, Any]:
    """Write what is missing of the shards of `manifests` into the folder `out`; returns the record (shards.json).

    Args:
        manifests: one or more, taken as one.
        hours: of audio in a shard; an hour of LibriSpeech's FLAC is about 60 MB.
        seed: of the order of utterances; None keeps the manifests' order.
        workers: processes.

    Raises:
        ManifestError: a manifest that cannot be read, or a row of it.
        ShardError: audio that is missing, broken or not as its row says, or a folder that holds other shards.
    """
    out = Path(out)
    plan = make_plan(manifests, hours, seed)
    out.mkdir(parents=True, exist_ok=True)
    with _only_one(out):
        done = _done(out, plan)
        missing = [shard for shard in range(plan.shards) if shard not in done]
        if missing:
            _check_audio(plan, missing)
            (out / WORK).mkdir(exist_ok=True)
            write_atomic(out / WORK / "plan.json", json.dumps({"fingerprint": plan.fingerprint}).encode())
            for shard, record in done.items():
                write_atomic(out / WORK / f"shard_{shard}.json", json.dumps(record).encode())
            (out / RECORD).unlink(missing_ok=True)
            for left in (out / WORK).glob("*.part"):
                left.unlink()
        elif (out / RECORD).is_file():
            shutil.rmtree(out / WORK, ignore_errors=True)
            return json.loads((out / RECORD).read_text())
        if done and progress and missing:
            print(f"{out}: {len(done)} of {plan.shards} shards are there: {len(missing)} to go", flush=True)
        for shard, record in run_workers(write_shard, missing, (plan, str(out), WORK), workers):
            done[shard] = record
            if progress:
                print(f"{out / tar_name(shard)}: {record['utterances']} utterances, {record['tar_bytes'] / 1e6:.1f} MB "
                      f"({len(done)} of {plan.shards})", flush=True)
        record = _finish(out, plan, [done[shard] for shard in range(plan.shards)])
        shutil.rmtree(out / WORK)
    return record


def verify_shards(
    manifests: Sequence[str | os.PathLike], out: str | os.PathLike, workers: int = 1
) -> tuple[dict[str, Any], list[str]]:
    """Compare shards with the record and with the manifests they were made of; returns (record, problems).

    Each tar and manifest is read whole: SHA-256 and size by the record, each member's name, place and size by its row,
    each row by the source's, which stands for every source row being there once; audio that is still where the source
    has it must have the same size.

    Raises:
        ManifestError, ShardError: there is nothing to compare.
    """
    out = Path(out)
    try:
        record = json.loads((out / RECORD).read_text())
        plan = make_plan(manifests, record["hours"], record["seed"])
    except FileNotFoundError:
        raise ShardError(f"{out / RECORD}: not there: the shards are not complete, write them first") from None
    except (ValueError, KeyError) as error:
        if isinstance(error, ManifestError):
            raise
        raise ShardError(f"{out / RECORD}: is not a record of shards ({error}): write them again") from error
    if plan.fingerprint != record["fingerprint"]:
        named = ", ".join(map(os.fspath, manifests))
        raise ShardError(f"{out / RECORD}: the shards were not made of {named} as it is now: "
                         f"{record['utterances']} utterances there, {plan.utterances} here")
    problems = []
    if len(record["shards"]) != plan.shards:
        problems.append(f"{out / RECORD}: names {len(record['shards'])} shards, the manifest makes {plan.shards}")
    shards = range(min(plan.shards, len(record["shards"])))
    for _, found in run_workers(verify_shard, shards, (plan, str(out), record["shards"]), workers):
        problems += found
    combined = hashlib.sha256()
    for shard in shards:
        if (out / manifest_name(shard)).is_file():
            combined.update((out / manifest_name(shard)).read_bytes())
    if not (out / COMBINED).is_file():
        problems.append(f"{out / COMBINED}: not there")
    elif not file_sha256(out / COMBINED) == combined.hexdigest() == record["manifest_sha256"]:
        problems.append(f"{out / COMBINED}: does not hold the rows of the shards' manifests")
    return record, problems


def _check_audio(plan: Plan, shards: Sequence[int]) -> None:
    """All audio must be there before the first byte is written."""
    absent = []
    for shard in shards:
        for index in plan.rows_of(shard):
            row, where = plan.row(index), plan.where(index)
            if not os.path.isfile(path := resolve_audio(row, where.rpartition(":")[0])):
                absent.append((index, f"{where}: no audio at {path}: mend the path or build the manifest again"))
    if absent:
        lines = [line for _, line in sorted(absent)[:MAX_SHOWN]]
        rest = [f"... and {len(absent) - MAX_SHOWN} more"] if len(absent) > MAX_SHOWN else []
        raise ShardError("\n".join(lines + rest))


def _done(out: Path, plan: Plan) -> dict[int, dict]:
    """The records of the shards that are in place, by number. Raises ShardError where they are those of other data."""
    whole = out / RECORD
    started = out / WORK / "plan.json"
    for path in (whole, started):
        if path.is_file():
            try:
                found = json.loads(path.read_text()).get("fingerprint")
            except ValueError:
                found = None
            if found != plan.fingerprint:
                raise ShardError(f"{path}: {out} holds shards of another manifest or other settings: "
                                 "give another --out, or remove the folder")
    if whole.is_file():
        records = json.loads(whole.read_text())["shards"]
    else:
        records = [json.loads(path.read_text()) for path in (out / WORK).glob("shard_*.json")]
        foreign = [] if started.is_file() else sorted(out.glob("audio_*.tar"))
        if foreign:
            raise ShardError(f"{foreign[0]}: was not written by this command: give another --out, or remove the folder")
    in_place = {}
    for record in records:
        tar, rows = out / tar_name(record["shard"]), out / manifest_name(record["shard"])
        if rows.is_file() and tar.is_file() and tar.stat().st_size == record["tar_bytes"]:
            in_place[record["shard"]] = record
    return in_place


def _finish(out: Path, plan: Plan, shards: list[dict]) -> dict[str, Any]:
    """The manifest of all rows, then the record, which says that all is there."""
    part = out / WORK / "combined.part"
    with open(part, "wb") as file:
        for shard in range(plan.shards):
            file.write((out / manifest_name(shard)).read_bytes())
        file.flush()
        os.fsync(file.fileno())
    digest = file_sha256(part)
    os.replace(part, out / COMBINED)
    record = {
        "format": 1, "fingerprint": plan.fingerprint, "hours": plan.hours, "seed": plan.seed,
        "utterances": plan.utterances, "seconds": round(plan.seconds, 3), "manifest_sha256": digest, "shards": shards,
    }
    write_atomic(out / RECORD, f"{json.dumps(record, indent=1)}\n".encode())
    return record


@contextmanager
def _only_one(out: Path, patience: float = 10.0) -> Iterator[None]:
    """Holds the folder's lock. Workers inherit it, so that a run waits until those of a killed one are gone."""
    lock = os.open(out, os.O_RDONLY)
    try:
        end = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > end:
                    raise ShardError(f"{out}: another run is writing here: wait or give another --out") from None
                time.sleep(0.1)
        yield
    finally:
        os.close(lock)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m manifests.shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("manifests", metavar="MANIFEST", nargs="+", help="manifests whose utterances are sharded")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--hours", metavar="H", type=float, default=4.0,
                        help="audio in a shard (default 4: 240 MB of LibriSpeech's FLAC)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the utterances' order (default 0)")
    parser.add_argument("--keep-order", action="store_true", help="leave the utterances in the manifest's order")
    parser.add_argument("--workers", metavar="N", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--verify", action="store_true", help="write nothing, check what is there")
    args = parser.parse_args(argv)
    if not args.hours > 0 or args.workers < 1:
        parser.error(f"--hours is {args.hours:g}, --workers {args.workers}: both must be over 0")
    begin = time.monotonic()
    try:
        if args.verify:
            record, problems = verify_shards(args.manifests, args.out, args.workers)
        else:
            seed = None if args.keep_order else args.seed
            record = write_shards(args.manifests, args.out, args.hours, seed, args.workers, progress=True)
            problems = []
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on with {args.out}", file=sys.stderr)
        return 130
    except (ManifestError, ShardError, OSError) as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 1
    for line in problems[:MAX_SHOWN]:
        print(f"error: {line}", file=sys.stderr)
    if problems:
        print(f"error: {show(str(args.out), 200)}: {len(problems)} problems; remove what is named and write again",
              file=sys.stderr)
        return 1
    size = sum(shard["tar_bytes"] for shard in record["shards"])
    print(f"{args.out}: {'verified' if args.verify else 'complete'}: {record['utterances']} utterances, "
          f"{record['seconds'] / 3600:.2f} h, {size / 1e9:.2f} GB in {len(record['shards'])} shards, "
          f"{time.monotonic() - begin:.0f} s\ntrain on them: corpus.train={args.out / COMBINED}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
