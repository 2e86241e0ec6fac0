"""Packs what comes home from a node: metrics, curves, predictions, logs, and weights in half precision.

Small things first, then weights, as far as the number of files allows; what does not fit is named. The parts have the
form of a bundle: `unpack --parts DIR --to HOME` puts them together at home and checks them.
"""

from __future__ import annotations

from pathlib import Path

from tools.offline_bundle.node import say
from tools.offline_bundle.parts import END_BYTES, HEADER_BYTES, LEAST_PIECE, BundleError, PartWriter, show_size

STEM = "home"
# In this order: what is nearer the front comes home first.
SMALL = ("evaluation/metrics.json", "offline/plan.json", "curve.csv", "config.yaml", "average.json", "report.md",
         "*-fp16.nemo.json", "evaluation/predictions_*.json", "curve.png", "offline/*.log",
         "doctor/report.json", "doctor/report.html", "tokenizer/*")
LOG_BYTES = 1 << 20  # of a log's end


def gather(exp: Path, weights: bool = True) -> list[tuple[str, Path | bytes]]:
    """(name, file or its last bytes) of all runs under `exp`, most wanted first. Raises BundleError for none."""
    runs = sorted(path.parent.parent for path in exp.glob("*/offline/plan.json"))
    if not runs:
        raise BundleError(f"{exp}: no run that `train` began: train first")
    found: list[tuple[str, Path | bytes]] = []
    for pattern in SMALL:
        for run in runs:
            for path in _whole(run, pattern):
                data: Path | bytes = path
                if path.suffix == ".log" and path.stat().st_size > LOG_BYTES:
                    data = path.read_bytes()[-LOG_BYTES:]
                found.append((f"{run.name}/{path.relative_to(run)}", data))
    if weights:
        found += [(f"{run.name}/{path.name}", path) for run in runs for path in _whole(run, "*-fp16.nemo")]
    return found


def _whole(run: Path, pattern: str) -> list[Path]:
    """Files without those whose names begin with a dot: they are being written."""
    return [path for path in sorted(run.glob(pattern)) if not path.name.startswith(".")]


def collect(exp: Path, out: Path, part_size: int, files: int, weights: bool = True) -> list[str]:
    """Writes at most `files` files (the index is one) of at most `part_size` bytes to `out`.

    Returns the names of what did not fit. Raises BundleError.
    """
    if files < 2:
        raise BundleError("--files: 2 at least, one of them is the index")
    room = (files - 1) * (part_size - END_BYTES - LEAST_PIECE)
    chosen, left, used = [], [], 0
    for name, data in gather(exp, weights):
        size = len(data) if isinstance(data, bytes) else data.stat().st_size
        cost = size + (HEADER_BYTES + 2 * len(name.encode()) + 24) * (2 + size // part_size)
        if used + cost > room:
            left.append(name)
            continue
        used += cost
        chosen.append((name, data))
    writer = PartWriter(out, STEM, part_size)
    for name, data in chosen:
        writer.add(name, data)
    index = writer.finish(left_out=left)
    for part in index["parts"]:
        say(f"{part['name']}  {show_size(part['bytes']):>9}  {part['files']:>4} files")
    total = sum(part["bytes"] for part in index["parts"])
    say(f"{out}: {len(index['parts']) + 1} files of at most {files}, {show_size(total)}, {len(chosen)} results in them")
    if left:
        say(f"left out, it did not fit: {', '.join(left)}")
    return left
