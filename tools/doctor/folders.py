"""Which files below a folder belong to one run, and in which order they were written. Standard library only."""

from __future__ import annotations

import re
from pathlib import Path

from tools.doctor.curves import first_steps

OWN = ("curve.csv", "metrics.csv", "doctor")  # a folder with one of them is a run's
WRITTEN = ("config.yaml", "hparams.yaml")  # and with one of these, unless there are several runs below it
EVENTS = "events.out.tfevents.*"
FEW = 4  # steps that make a curve: a test or a sanity check leaves fewer
LATER = 100  # steps after the other's beginning: a run that was begun again goes on, another one begins anew


def events(folder: Path) -> list[Path]:
    """TensorBoard's files below a folder, oldest first: by the time in the name, which a copy keeps."""
    return sorted(folder.rglob(EVENTS), key=_made)


def csv_logs(folder: Path) -> list[Path]:
    """Lightning's metrics.csv below a folder in the order in which a run that was begun again wrote them: by the first
    step, and of those that begin alike the newest last."""
    found = [path for path in folder.rglob("metrics.csv") if path.is_file() and path.parent.name != "doctor"]
    return sorted(found, key=lambda path: (_begin(path) // LATER, path.stat().st_mtime, str(path)))


def newest_of(folder: Path) -> tuple[Path, list[Path]]:
    """(the newest run below a folder, all of them, oldest first) where it holds several; (folder, []) where it is one.

    Folders whose curve goes on where another's ended are sittings of one run.
    """
    if any((folder / name).exists() for name in OWN) or any(folder.glob(EVENTS)):
        return folder, []
    versions = "version_*/" if any((folder / name).exists() for name in WRITTEN) else ""  # Lightning's, one a start
    for pattern in ("curve.csv", "metrics.csv", EVENTS):
        runs: dict[Path, list[Path]] = {}
        for path in folder.rglob(versions + pattern):
            if len(first_steps(path, FEW)) == FEW:
                runs.setdefault(_place(path, folder), []).append(path)
        whole = [place for place in runs if not any(other in place.parents for other in runs)]
        if len(whole) > 1:
            whole.sort(key=lambda place: max(_made(path) for path in runs[place]))
            begins = [min(_begin(path) for path in runs[place]) for place in whole]
            if any(begin < min(begins[:k]) + LATER for k, begin in enumerate(begins) if k):
                return whole[-1], whole
    return folder, []


def _place(path: Path, top: Path) -> Path:
    """The run's folder of a file: above the doctor's, and above run_0, run_1, ..., where NeMo's exp_manager moves what
    earlier sittings left."""
    place = path.parent
    while place != top and (place.name == "doctor" or re.fullmatch(r"run_\d+", place.name)):
        place = place.parent
    return place


def begin(folder: Path) -> int:
    """The first step of the curves below a run's folder."""
    return min((_begin(path) for pattern in ("curve.csv", "metrics.csv", EVENTS) for path in folder.rglob(pattern)),
               default=0)


def _begin(path: Path) -> int:
    return next(iter(first_steps(path, 1)), 0)


def _made(path: Path) -> tuple[float, str]:
    """When a file was begun by its name, else when it was last written; then its name."""
    named = re.search(r"tfevents\.(\d+)", path.name)
    return (float(named[1]) if named else path.stat().st_mtime, str(path))
