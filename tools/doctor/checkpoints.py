"""What the checkpoints of a run say (family "run"): weights that are not finite, and weights that never moved.

Weights only: files are opened with `weights_only=True`, and OmegaConf's containers are the only classes allowed beside.
"""

from __future__ import annotations

import re
import tarfile
import zipfile
from pathlib import Path

from tools.doctor.finding import Finding
from tools.doctor.registry import NotExamined, check

MOST = 6  # checkpoints opened to be compared
MOST_BYTES = 6_000_000_000  # of one of them
# How torch names parameters, also of recurrent layers and under weight_norm; other names may be of tables and masks.
PARAMETER = re.compile(r"(weight|bias)(_\w+)?$|\bparametrizations\.\w+\.original\d*$")


def find(folder: Path) -> list[Path]:
    """Checkpoints below a folder, oldest first."""
    paths = [p for pattern in ("*.ckpt", "*.nemo") for p in Path(folder).rglob(pattern) if p.is_file()]
    return sorted(paths, key=lambda p: (p.stat().st_mtime, p.name))


def chosen(paths: list[Path]) -> tuple[list[Path], list[str]]:
    """(those to be opened, at most MOST: the first, the last and some between; what is said of those too large for it)."""
    small = [p for p in paths if p.stat().st_size < MOST_BYTES]
    large = [f"{p.name}: left out, with {p.stat().st_size / 1e9:.1f} GB" for p in paths if p not in small]
    if len(small) > MOST:
        small = [small[round(k * (len(small) - 1) / (MOST - 1))] for k in range(MOST)]
    return small, large


def callbacks_of(path: Path) -> list[str]:
    """How the callbacks of a run name themselves in its checkpoint, "EarlyStopping{'monitor': ..., 'mode': ...}"; none
    where it cannot be read."""
    try:
        return [str(name) for name in _saved(path).get("callbacks", {})]
    except ValueError:
        return []


def load(path: Path) -> tuple[dict, int | None]:
    """(name -> tensor, step or None) of a Lightning checkpoint or a `.nemo`.

    Raises ValueError with one line where it cannot be read without unpickling more than tensors.
    """
    import torch

    saved = _saved(path)
    weights = saved.get("state_dict", saved)
    weights = {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}
    if not weights:
        raise ValueError(f"{path.name}: no weights in it")
    return weights, saved.get("global_step")


def _saved(path: Path) -> dict:
    """What a checkpoint holds, or the weights of a `.nemo`. Raises ValueError with one line."""
    import torch

    from tools.doctor.opening import _load_with_config, not_a_model

    if (wrong := not_a_model(path)) is not None:
        raise ValueError(f"{path.name}: {wrong}")
    try:
        if path.suffix == ".nemo":
            with tarfile.open(path) as tar:
                member = next((m for m in tar.getmembers() if m.name.endswith("model_weights.ckpt")), None)
                if member is None:
                    raise ValueError("no model_weights.ckpt in it")
                return torch.load(tar.extractfile(member), map_location="cpu", weights_only=True)
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception:  # its hyper-parameters are OmegaConf's nodes
            saved = _load_with_config(path)
    except Exception as error:  # tar, pickle, zip, torch: no common kind
        raise ValueError(f"{path.name}: {type(error).__name__}: {' '.join(str(error).split())[:160]}") from None
    return saved if isinstance(saved, dict) else {}


@check("run", faults=("run-nan", "frozen", "input-unreadable"), needs=("run",))
def weights_of_the_checkpoints(subject):
    """Weights that are not finite, or that never moved."""
    paths = find(subject.run)
    if not paths:
        raise NotExamined("no checkpoint in this folder")
    paths, large = chosen(paths)
    first, unread = None, []
    oldest: dict = {}
    last_good: str | None = None
    for path in paths:
        if subject.seconds_left() < 2:
            unread.append(f"{path.name}: no time left")
            break
        try:
            weights, step = load(path)
        except ValueError as error:
            unread.append(str(error))
            continue
        broken = [name for name, value in weights.items() if _is_broken(name, value, oldest.get(name))]
        oldest = oldest or weights
        if broken:
            yield _broken(path, step, broken, last_good)
            break
        last_good = path.name
        if first is None or (step is not None and first[1] is not None and step < first[1]):
            first = (path, step, weights)
        elif step is not None and first[1] is not None and step > first[1]:
            yield from _unmoved(subject, first, (path, step, weights))
            first = (path, step, weights) if first[1] == step else first
    if unread or large:
        if unread and len(unread) == len(paths):
            yield Finding(
                "input-unreadable", "warning", f"None of the {len(paths)} checkpoints can be read: {unread[0]}",
                "A file cut off while it was written, or one that holds more than tensors.", {"files": unread},
                ["use the checkpoint before it"], 0.8, where=str(paths[-1]))
        raise NotExamined("; ".join([*unread[:3], *large[:3]]))


def _is_broken(name: str, value, before) -> bool:
    """Whether a tensor is not finite, and was not made so: masks hold -inf, in each checkpoint the same.

    `before`: the tensor of that name in the first checkpoint, None where this is the first.
    """
    if not value.is_floating_point() or bool(value.isfinite().all()):
        return False
    if bool(value.isnan().any()):
        return True
    if before is None:
        return PARAMETER.search(name) is not None or "running_" in name
    return not (before.shape == value.shape and bool((before == value).all()))


def _broken(path: Path, step, broken: list[str], last_good: str | None) -> Finding:
    buffers = [name for name in broken if "running_" in name]
    only = len(buffers) == len(broken)
    at = f" of step {step}" if step is not None else ""
    return Finding(
        "run-nan", "prevents",
        f"{len(broken)} tensors of {path.name}{at} are not finite, first {broken[0]}.",
        "All of them are running statistics of BatchNorm: one batch that was not finite poisons them for good, and "
        "evaluation gives NaN although training goes on." if only else
        "A step with a gradient that was not finite was taken. From there on every output is NaN.",
        {"tensors": broken[:12], "of them running statistics": len(buffers),
        "last checkpoint that is whole": last_good},
        [f"go on from {last_good}" if last_good else "start again; no checkpoint is whole",
         "find the batch: attach the doctor's callback, which names the first module and the utterances"], 0.95,
        where=str(path))


def _unmoved(subject, first, last) -> list[Finding]:
    """Parameters that are bit for bit the same in two checkpoints of different steps.

    Where the run has learned all the same, or began with trained weights, they may have been frozen on purpose. Tensors
    that are not named as parameters are counted only where nothing moved at all: a buffer is the same all along.
    """
    import torch

    from tools.doctor.explain import trace_of
    from tools.doctor.trace import shape
    from tools.doctor.trained import look_trained, started_from

    (path_a, step_a, a), (path_b, step_b, b) = first, last
    names = [n for n in a if n in b and a[n].shape == b[n].shape and a[n].is_floating_point() and a[n].numel() > 1
             and not any(part in n for part in ("running_", "num_batches", "preprocessor", "featurizer", "pos_enc",
                 "_metric"))]
    same = [n for n in names if torch.equal(a[n], b[n])]
    moved = [n for n in names if n not in set(same)]
    if moved:
        names, same = ([n for n in group if PARAMETER.search(n)] for group in (names, same))
    values = sum(a[n].numel() for n in names)
    share = sum(a[n].numel() for n in same) / max(values, 1)
    if not same or share < 1e-3:
        return []
    curve = shape(trace_of(subject))
    learned = curve is not None and bool(curve.learned) and not curve.lost
    started = started_from(subject.settings, trained=moved)
    if not started and look_trained({n: a[n] for n in same}):
        started = "the gains of their normalisations differ, as training leaves them"
    meant = "the loss has fallen far below that of letters alone" if learned else started if moved else ""
    return [Finding(
        "frozen", "prevents" if share > 0.5 and not meant else "warning",
        f"{len(same)} of {len(names)} tensors ({share:.0%} of the values) are the same at step {step_a} and at step "
        f"{step_b}, first {same[0]}.",
        ("Nothing updates them: frozen, without gradient, or in no optimizer." if moved else
         "Nothing was updated at all: a learning rate of 0, or an optimizer without parameters.")
        + (f" It may be meant: {meant}." if meant else ""),
        {"tensors": same[:12], "share of the values": share, "checkpoints": [path_a.name, path_b.name]},
        ["look for requires_grad=False, freeze(), .detach(), and at what the optimizer is given"],
        0.5 if meant else 0.85, where=same[0])]
