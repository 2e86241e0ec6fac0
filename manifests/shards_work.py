"""One shard written or verified, and processes that do many at once."""

import hashlib
import json
import multiprocessing
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from manifests.audio import AudioError, read_header
from manifests.schema import ManifestError, resolve_audio, write_atomic
from manifests.shards_format import BLOCK, ShardError, file_sha256, manifest_name, shard_path, tar_name
from manifests.shards_plan import Plan
from manifests.validate import DURATION_TOLERANCE

END = bytes(2 * BLOCK)  # of a tar


def write_shard(shard: int, plan: Plan, out: str, work: str, alive: Callable[[], None]) -> dict[str, Any]:
    """Write one tar and its manifest; each gets its name when it is whole and on the disk. Returns the shard's record.

    Raises ShardError with `manifest:line` at the first audio that is not as its row says.
    """
    folder = Path(out)
    tar, part = folder / tar_name(shard), folder / work / f"{tar_name(shard)}.part"
    digest, rows, position, seconds = hashlib.sha256(), [], 0, 0.0
    with open(part, "wb") as file:
        for index in plan.rows_of(shard):
            alive()
            row, audio = _checked(plan, index)
            head = tarfile.TarInfo(row["audio_filepath"])
            head.size = len(audio)  # the rest is the same everywhere: no time, no owner
            padding = bytes(-len(audio) % BLOCK)
            for data in (head.tobuf(tarfile.USTAR_FORMAT), audio, padding):
                file.write(data)
                digest.update(data)
            row |= {"shard_id": shard, "tar_offset": position + BLOCK, "tar_bytes": len(audio)}
            position += BLOCK + len(audio) + len(padding)
            seconds += row["duration"]
            rows.append(json.dumps(row, ensure_ascii=False, allow_nan=False))
        file.write(END)
        digest.update(END)
        file.flush()
        os.fsync(file.fileno())
    manifest = ("\n".join(rows) + "\n").encode()
    alive()
    os.replace(part, tar)
    write_atomic(folder / manifest_name(shard), manifest)
    record = {
        "shard": shard, "utterances": len(rows), "seconds": round(seconds, 3), "tar_bytes": position + len(END),
        "tar_sha256": digest.hexdigest(), "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
    }
    write_atomic(folder / work / f"shard_{shard}.json", json.dumps(record).encode())
    return record


def _checked(plan: Plan, index: int) -> tuple[dict[str, Any], bytes]:
    """A row as the shard has it and its audio's bytes, after a look at their header."""
    where = plan.where(index)
    source, row = plan.row(index), plan.shard_row(index)
    path = resolve_audio(source, where.rpartition(":")[0])
    try:
        header = read_header(path)
        audio = Path(path).read_bytes()
    except AudioError as error:
        raise ShardError(f"{where}: {error}") from error
    except OSError as error:
        raise ShardError(f"{where}: {path}: cannot be read: {error.strerror or error}") from error
    if header.channels != 1:
        raise ShardError(f"{where}: {path} has {header.channels} channels: mix it down to one")
    if row.setdefault("sampling_rate", header.sampling_rate) != header.sampling_rate:
        raise ShardError(f"{where}: sampling_rate is {row['sampling_rate']}, {path} has {header.sampling_rate}: "
                         "build the manifest again")
    if abs(row["duration"] - header.duration) > DURATION_TOLERANCE:
        raise ShardError(f"{where}: duration is {row['duration']} s, {path} has {header.duration:.3f} s: "
                         "build the manifest again")
    return row, audio


def verify_shard(shard: int, plan: Plan, out: str, records: list[dict], alive: Callable[[], None]) -> list[str]:
    """What is wrong with one shard, a line each."""
    tar, manifest, record = os.path.join(out, tar_name(shard)), os.path.join(out, manifest_name(shard)), records[shard]
    problems: list[str] = []
    for path, key in ((tar, "tar_sha256"), (manifest, "manifest_sha256")):
        try:
            if file_sha256(path) != record[key]:
                problems.append(f"{path}: its SHA-256 is not that of the record: it was changed or copied in part")
        except OSError as error:
            problems.append(f"{path}: cannot be read: {error.strerror or error}")
    alive()
    if any("cannot be read" in problem for problem in problems):
        return problems
    try:
        with open(manifest, "rb") as file:
            rows = [json.loads(line) for line in file]
        with tarfile.open(tar, "r:") as archive:
            members = [(member.name, member.offset_data, member.size) for member in archive]
    except (ValueError, tarfile.TarError) as error:
        return [*problems, f"{tar}: tar and manifest cannot be read together: {error}"]
    if members != [(row["audio_filepath"], row["tar_offset"], row["tar_bytes"]) for row in rows]:
        problems.append(f"{tar}: names, places and sizes in it are not those of {manifest}")
    wanted = plan.rows_of(shard)
    if not len(rows) == len(wanted) == record["utterances"]:
        problems.append(f"{manifest}: holds {len(rows)} rows, not {len(wanted)}")
    for number, (index, row) in enumerate(zip(wanted, rows), 1):
        expected = plan.shard_row(index)
        if {**row, **expected} != row:
            problems.append(f"{manifest}:{number}: is not the row of {plan.where(index)}")
        where = plan.where(index)
        try:
            size = os.stat(resolve_audio(plan.row(index), where.rpartition(":")[0])).st_size
        except OSError:
            continue  # shards may well outlive the files they were made of
        if size != row["tar_bytes"]:
            problems.append(f"{shard_path(row, os.path.join(out, 'x'))}: has {row['tar_bytes']} bytes, "
                            f"the audio of {where} now {size}")
    return problems


def run_workers(
    task: Callable, shards: Iterable[int], arguments: tuple, workers: int
) -> Iterator[tuple[int, Any]]:
    """Yields (shard, task(shard, *arguments, alive)) as they come, from `workers` processes.

    The first error ends all of them and is raised here. Each worker has its shards from the start and ends when this
    process is gone, so that nothing goes on writing after a kill -9.
    """
    shards = list(shards)
    if workers <= 1 or len(shards) < 2:
        for shard in shards:
            yield shard, task(shard, *arguments, lambda: None)
        return
    context = multiprocessing.get_context("fork")  # the plan is shared, not copied
    running = {}
    try:
        for number in range(min(workers, len(shards))):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_work, args=(task, shards[number::workers], arguments, theirs, os.getpid()), daemon=True
            )
            process.start()
            theirs.close()
            running[ours] = process
        while running:
            for pipe in wait(list(running)):
                try:
                    shard, result = pipe.recv()
                except EOFError:
                    process = running.pop(pipe)
                    process.join()
                    if process.exitcode:
                        message = f"a worker ended with status {process.exitcode}: the same command goes on"
                        raise ShardError(message) from None
                    continue
                if isinstance(result, Exception):
                    raise result
                yield shard, result
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()


def _work(task: Callable, shards: list[int], arguments: tuple, pipe, parent: int) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def alive() -> None:
        if os.getppid() != parent:
            os._exit(1)

    for shard in shards:
        try:
            pipe.send((shard, task(shard, *arguments, alive)))
        except (ShardError, ManifestError, OSError) as error:
            pipe.send((shard, ShardError(str(error))))
            return
