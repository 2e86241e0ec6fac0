"""What the benches share: turns, ratios of pairs, what the machine is, and results as JSON with a table beside them.

Imports nothing heavy at the top. Two ways of one thing are measured in turns in one process; what counts is the ratio
within a pair, which had the same neighbours on the machine, with the median and the quartiles over the pairs.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from manifests.report import percentiles
from manifests.schema import write_atomic
from recipes.processor import processor
from recipes.threads import give_back_memory, set_threads

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results"
TABLES = "README.md"  # beside the JSON files, made from all of them
HEAD = "# Benchmarks\n\nMade by `python -m tools.bench NAME` from the JSON files beside it: do not edit.\n"


class BenchError(RuntimeError):
    """A measurement that cannot be made, or would compare two different things. The message is one line."""


class Cost(NamedTuple):
    """Seconds of one call: by the clock, and of CPU time of the process."""

    wall: float
    cpu: float


def measure(function: Callable[[], Any], synchronise: Callable[[], None] = lambda: None) -> Cost:
    """Call it once; `synchronise` waits for what a device still does, before the start and before the end."""
    synchronise()
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    synchronise()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


def take_turns(ways: dict[str, Callable[[int], Any]], rounds: int, warm: int = 1,
               synchronise: Callable[[], None] = lambda: None) -> dict[str, list[Cost]]:
    """`rounds` calls of each way with the number of the round, in turns; who goes first changes from round to round.

    The first `warm` rounds (numbers below 0) do not count: imports, caches, kernels made for a shape.
    """
    names = list(ways)
    costs: dict[str, list[Cost]] = {name: [] for name in names}
    for number in range(-warm, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            cost = measure(lambda: ways[name](number), synchronise)
            if number >= 0:
                costs[name].append(cost)
        print(f"round {number + 1} of {rounds}" if number >= 0 else "warm-up", file=sys.stderr, flush=True)
    return costs


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, least and most of some figures, and how many they are."""
    found = percentiles(values, (0, 25, 50, 75, 100))
    names = {"median": "p50", "q1": "p25", "q3": "p75", "least": "p0", "most": "p100"}
    return {**{name: found[key] for name, key in names.items()}, "count": len(values)}


def ratios(theirs: Sequence[Cost], ours: Sequence[Cost]) -> dict[str, dict[str, float]]:
    """How many times faster ours is, pair by pair: `wall` by the clock, `cpu` by CPU time."""
    return {
        clock: spread([getattr(b, clock) / getattr(a, clock) for b, a in zip(theirs, ours, strict=True)])
        for clock in Cost._fields
    }


def shown(ratio: dict[str, float]) -> str:
    """`1.31 (1.28 to 1.35)`: the median with the quartiles."""
    return f"{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f})"


def fair_clock(device_type: str, threads: int) -> str:
    """`cpu` for one thread of a CPU, whose time others on the machine cannot take; else `wall`."""
    return "cpu" if device_type == "cpu" and threads == 1 else "wall"


# ---- memory ------------------------------------------------------------------------------------------------------


def rss(key: str = "VmRSS") -> int | None:
    """Bytes of memory in use (`VmRSS`), or their peak since `reset_peak` (`VmHWM`); None where /proc does not say."""
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def release() -> None:
    """Give freed memory back to the system, so that it does not hide what comes next."""
    gc.collect()
    give_back_memory()


def reset_peak() -> bool:
    """Let the kernel forget the peak so far; False where it does not."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory(function: Callable[[], Any], device) -> int | None:
    """Bytes that a call takes at its peak above what was held before it; None where that cannot be measured.

    CUDA: of tensors, by torch's allocator. CPU: of the whole process, by the kernel.
    """
    release()
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    before = rss()
    if before is None or not reset_peak():
        return None
    function()
    return max((rss("VmHWM") or before) - before, 0)


# ---- running -----------------------------------------------------------------------------------------------------


def set_up() -> None:
    """The recipe's own threads and silence, before torch and NeMo are imported by a bench's main."""
    from recipes.quiet import quiet_imports

    set_threads()
    quiet_imports()


def guarded(name: str, function: Callable[[], Any]) -> int:
    """Exit status 0, or 1 after one line where it raised BenchError."""
    try:
        function()
    except BenchError as error:
        print(f"bench {name}: {error}", file=sys.stderr)
        return 1
    return 0


# ---- options and results -----------------------------------------------------------------------------------------


def parser(name: str, doc: str) -> argparse.ArgumentParser:
    """What all benches take: where the result goes, and a remark on the machine."""
    made = argparse.ArgumentParser(
        prog=f"python -m tools.bench {name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", metavar="OUT", type=Path,
                      help=f"where the figures go (default {name}.json in results, with a GPU's name in it for one); "
                      f"{TABLES} beside it is made anew from all in its folder")
    made.add_argument("--note", default="", help="a remark on the machine that the table shall bear")
    return made


def step_parser(name: str, doc: str) -> argparse.ArgumentParser:
    """What the benches of train steps take besides: speech, batches, turns, precision, device."""
    options = parser(name, doc)
    options.add_argument("--manifest", type=Path, help="speech to step over; without it noise of 2 to 16 s")
    options.add_argument("--corpus", default="librispeech_8h", help="whose duration buckets (default %(default)s)")
    options.add_argument("--batch-seconds", type=float, help="seconds of audio in a batch (default: by the size)")
    options.add_argument("--pairs", type=int, default=8, help="steps of each side that count (default %(default)s)")
    options.add_argument("--warm", type=int, default=1, help="steps of each that do not (default %(default)s)")
    options.add_argument("--precision", default="auto", choices=("auto", "32", "bf16-mixed"))
    options.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return options


def describe(device_text: str, threads: int) -> dict[str, Any]:
    """Hardware and versions that a figure depends on."""
    versions = {name: _version(name) for name in ("torch", "nemo_toolkit", "lhotse", "soundfile")}
    return {
        "device": device_text,
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        "versions": {name: version for name, version in versions.items() if version},
    }


def default_path(name: str, device_text: str) -> Path:
    """Where a bench's figures lie: those of a GPU beside those of a CPU, not in their place."""
    words = [] if device_text == "CPU" else re.findall(r"[a-z0-9]+", device_text.lower())
    return RESULTS / f"{'_'.join([name, *words])}.json"


def save(out: Path | None, name: str, doc: str, argv: Sequence[str], machine: dict, head: list[str],
         rows: list[list[str]], note: str = "", **figures) -> dict[str, Any]:
    """Write one bench's result to `out`, None for its `default_path`, and the tables of its folder; returns it."""
    out = out or default_path(name, machine["device"])
    result = {
        "bench": name,
        "title": doc.strip().partition("\n")[0],
        # Not where things lie on this machine, only what they are called.
        "command": " ".join(["python -m tools.bench", name, *(_bare(argument) for argument in _told(argv))]),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": machine,
        "note": note,
        "table": {"head": head, "rows": rows},
        **figures,
    }
    write_atomic(out, f"{json.dumps(result, indent=1)}\n".encode())
    page = out.parent / TABLES
    if not page.exists() or page.read_bytes().startswith(HEAD.encode()):  # else somebody's own
        write_atomic(page, tables(out.parent).encode())
    return result


def tables(folder: Path) -> str:
    """All results of a folder as one page of Markdown."""
    parts = [HEAD.rstrip()]
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text())
        except ValueError:
            continue
        if not isinstance(result, dict) or not {"bench", "machine", "table"} <= result.keys():  # not a bench's
            continue
        machine, table = result["machine"], result["table"]
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
        threads = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
        where = f"{machine['device']}, {threads} of {machine['cores']} cores, {versions}"
        parts += ["", f"## {path.stem}", "", result["title"], "", f"`{result['command']}`, commit {result['commit']}, "
                  f"{result['date']}; {where}{'; ' + result['note'] if result['note'] else ''}.", ""]
        parts += [f"| {' | '.join(row)} |" for row in (table["head"], ["---"] * len(table["head"]), *table["rows"])]
        parts += [f"\n{line}" for line in result.get("remarks", [])]
    return "\n".join(parts) + "\n"


def _told(argv: Sequence[str]) -> list[str]:
    """The arguments without those that say nothing about the measurement."""
    kept, skip = [], False
    for argument in argv:
        if skip or argument in ("--json", "--note"):
            skip = not skip
        elif not argument.startswith(("--json=", "--note=")):
            kept.append(argument)
    return kept


def _bare(argument: str) -> str:
    name, equals, value = argument.rpartition("=")
    return f"{name}{equals}{Path(value).name if os.path.isabs(value) else value}"


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "recipes", "tools/bench")
        changed = [line for line in changed.splitlines() if "tools/bench/results/" not in line]
        return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
