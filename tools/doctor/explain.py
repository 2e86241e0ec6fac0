"""Reads what a run left behind into a Trace: curve.csv of ours, CSV logs, TensorBoard events, text logs.

`python -m tools.doctor explain RUN_DIR` runs the checks of the families "run" and "metrics" on it, and those of the
data and the schedule on what its configuration names. Nothing is unpickled but tensors. Torch and TensorBoard are
imported only where there are files for them.
"""

from __future__ import annotations

import csv
import json
import re
import time
from pathlib import Path
from statistics import median

from tools.doctor.finding import Finding, Report
from tools.doctor.registry import NotExamined, check
from tools.doctor.trace import BadStep, Points, Trace

# Series of a Trace <- names under which trainers log it, the surest first.
NAMES = {
    "loss": ("loss_per_char", "train_loss", "train_loss_step", "loss", "train/loss", "training_loss", "loss/train"),
    "grad_norm": ("grad_norm", "grad_norm/total", "grad_2.0_norm_total", "grad_2.0_norm_total_step", "gradient_norm"),
    "lr": ("learning_rate", "lr", "lr-AdamW", "lr-Adam", "lr-SGD", "lr-Novograd", "train/lr", "optimizer.lr"),
    "blank_rate": ("blank_rate",),
    "val_loss": ("val_loss", "validation_loss", "val/loss", "valid_loss", "dev_loss"),
    "val_wer": ("val_wer", "validation_wer", "val/wer", "wer", "valid_wer", "dev_wer"),
    "val_cer": ("val_cer", "val/cer", "cer"),
    "val_blank_rate": ("val_blank_rate",),
    "infeasible": ("infeasible_utterances",),
}
STEP_NAMES = ("step", "global_step", "trainer/global_step", "steps")
TIMING = ("train_step_timing in s", "train_step_timing")
NON_FINITE = ("run-nan", "explodes", "features-bad", "precision-overflow", "data-target-too-long", "loss-wrong")
LOGS = ("*.log", "*.txt", "*.out", "*.err")
LOG_BYTES = 20_000_000  # of one log, from its end


def trace_of(subject) -> Trace:
    """The trace of `subject.run`, read once."""
    trace = subject.__dict__.get("_trace")
    if trace is None:
        trace = subject.__dict__["_trace"] = read_run(subject.run, subject.settings,
            lambda: subject.rows.get("train", []))
    return trace


def read_run(folder: Path, settings=None, train_rows=lambda: []) -> Trace:
    """The Trace of a run's folder.

    Args:
        folder: searched for curve.csv, else metrics.csv, else events.out.tfevents.*; and for text logs.
        settings: configs.Settings of the run, or None.
        train_rows: gives the rows of the train manifest, to express a loss an utterance in nats a character.
    """
    folder = Path(folder)
    trace = Trace(settings=settings)
    if settings is not None:
        _plan(trace, settings)
    columns = _columns(folder, trace)
    for series, names in NAMES.items():
        name = next((n for n in names if columns.get(n)), None)
        if name is not None:
            trace.series[series] = sorted(columns[name], key=lambda p: p[0])
            if series == "loss":
                _unit(trace, name, settings, train_rows)
    watched = folder / "doctor" / "curve.csv"
    for name, points in (read_csv(watched) if watched.is_file() else {}).items():
        if name not in trace.series:
            trace.series[name] = points
            if name == "loss":
                trace.loss_unit = "label"  # its level was measured
    if levels := trace.values("level"):
        trace.level = median(levels) if trace.loss_unit != "unknown" else None
    if (saved := saved_report(folder)) is not None:
        trace.reported = set(saved.ids)
    elif (path := folder / "doctor" / "report.json").is_file():
        trace.unread[path] = "no report of the doctor"
    _logs(folder, trace)
    last = trace.last_step
    trace.ended = not trace.planned or last >= 0.98 * trace.planned or _quiet_for(folder) > 3600
    return trace


def _plan(trace: Trace, settings) -> None:
    steps = settings.number("trainer.max_steps")
    trace.planned = int(steps) if steps and steps > 0 else None
    warmup = settings.number("model.optim.sched.warmup_steps")
    trace.warmup = int(warmup) if warmup and warmup > 0 else None
    ratio = settings.number("model.optim.sched.warmup_ratio")
    if trace.warmup is None and ratio and trace.planned:
        trace.warmup = int(ratio * trace.planned)
    trace.clip = settings.number("trainer.gradient_clip_val", 0.0) if settings.get("trainer") is not None else None
    trace.precision = str(settings.get("trainer.precision", ""))
    trace.optimizer = str(settings.get("model.optim.name", ""))
    if settings.recipe:
        trace.recipe, trace.corpus = str(settings.get("name", "")), str(settings.get("corpus.name", ""))


# ---- curves ----------------------------------------------------------------------------------------------------


def _columns(folder: Path, trace: Trace) -> dict[str, Points]:
    """Column -> points, from our curve, else CSV logs; what they lack from TensorBoard. Sources go into the trace."""
    events = sorted(folder.rglob("events.out.tfevents.*"), key=lambda p: p.stat().st_mtime)
    logged = _event_columns(folder, events, trace)
    for path in [folder / "curve.csv", *sorted(folder.rglob("metrics.csv"), key=_age)]:
        if not path.is_file() or path.parent.name == "doctor":
            continue
        if not (columns := read_csv(path)):
            trace.unread[path] = f"no numbers under a column of steps ({', '.join(STEP_NAMES[:2])})"
        else:
            trace.sources.insert(0, str(path.relative_to(folder)))
            known = {series for series, names in NAMES.items() if any(columns.get(name) for name in names)}
            more = [name for series, names in NAMES.items() if series not in known for name in names if name in logged]
            return {**columns, **{name: logged[name] for name in more}}
    return logged


def _event_columns(folder: Path, events: list[Path], trace: Trace) -> dict[str, Points]:
    """Columns of TensorBoard files, oldest first; the wait for data goes into the trace."""
    columns: dict[str, Points] = {}
    for path in events[-20:]:
        found, waits = read_events(path)
        if found:
            trace.sources.append(str(path.relative_to(folder)))
        else:
            trace.unread[path] = "no scalars of TensorBoard"
        for name, points in found.items():
            # A resumed run writes a new file: what it repeats replaces what the earlier one had after its step.
            first = points[0][0]
            columns[name] = [p for p in columns.get(name, []) if p[0] < first] + points
        if waits:
            trace.series.setdefault("wait", []).extend(waits)
    return columns


def _age(path: Path) -> float:
    return -path.stat().st_mtime


def read_csv(path: Path) -> dict[str, Points]:
    """Columns of a CSV with a column of steps; cells that are no number are passed over, NaN and inf are kept.

    A last line without its end is left out: it was cut, and half a number is another number.
    """
    columns: dict[str, Points] = {}
    try:
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            lines = (line for line in file if line.endswith(("\n", "\r")))
            reader = csv.DictReader(lines)
            key = next((name for name in STEP_NAMES if name in (reader.fieldnames or ())), None)
            if key is None:
                return {}
            for row in reader:
                try:
                    step = int(float(row[key]))
                except (TypeError, ValueError):
                    continue
                for name, cell in row.items():
                    if name not in (None, key) and isinstance(cell, str) and cell.strip():
                        try:
                            columns.setdefault(name, []).append((step, float(cell)))
                        except ValueError:
                            continue
    except (OSError, csv.Error):
        return {}
    return columns


def read_events(path: Path) -> tuple[dict[str, Points], Points]:
    """(columns, share of the time waited for data) of one TensorBoard event file."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        return {}, []
    try:
        events = EventAccumulator(str(path), size_guidance={"scalars": 0, "tensors": 1, "images": 1, "histograms": 1})
        events.Reload()
        tags = events.Tags().get("scalars", [])
    except Exception:  # a file cut off in the middle raises several kinds
        return {}, []
    columns = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}
    waits: Points = []
    timing = next((tag for tag in TIMING if tag in tags), None)
    if timing is not None:
        scalars = events.Scalars(timing)
        for before, after in zip(scalars, scalars[1:]):
            steps, seconds = after.step - before.step, after.wall_time - before.wall_time
            if steps > 0 and seconds > 0 and after.value > 0:
                waits.append((after.step, min(max(1 - after.value * steps / seconds, 0.0), 1.0)))
        # Validations and checkpoints lie between some: what is usual between two is the loader's.
        if len(waits) >= 5:
            middle = median(v for _, v in waits)
            waits = [(s, min(v, 2 * middle + 0.05)) for s, v in waits]
        else:
            waits = []
    return columns, waits


def _unit(trace: Trace, name: str, settings, train_rows) -> None:
    """The loss in nats a character where the name or the configuration and the manifest allow it."""
    tokens = settings is not None and settings.get("model.tokenizer") is not None
    ours = name == "loss_per_char" or (settings is not None and settings.recipe)
    if ours:
        trace.loss_unit = "label" if tokens else "character"
        return
    if settings is None or tokens or settings.get("model.ctc_reduction", "mean_batch") != "mean_batch":
        if settings is not None and not tokens and settings.get("model.ctc_reduction") == "mean_volume":
            trace.loss_unit = "character"
        return
    texts = [len(str(row.get("text", ""))) for row in train_rows()]
    if texts and sum(texts):
        mean = sum(texts) / len(texts)
        trace.series["loss"] = [(step, value / mean) for step, value in trace.series["loss"]]
        trace.loss_unit = "character"


def _quiet_for(folder: Path) -> float:
    """Seconds since anything in the folder's curves or logs was written."""
    files = [p for pattern in ("curve.csv", "metrics.csv", "events.out.tfevents.*", *LOGS) for p
        in folder.rglob(pattern)]
    return time.time() - max((p.stat().st_mtime for p in files), default=0.0)


# ---- text logs -------------------------------------------------------------------------------------------------

# What is read from a line -> pattern. Ours, NeMo's, Lightning's, torch's.
SKIPPED = re.compile(r"step (\d+): (loss|gradient norm) is (\S+): batch skipped.*?utterances (\[.*?\])(.*)")
INFEASIBLE = re.compile(r"utterance (\S+): CTC loss is infinite, (\d+) targets .*?into (\d+) output frames")
FORGOTTEN = re.compile(r"doctor: step (\d+): (\S+) is not finite; origin: (\S+) (\S*); utterances (.*)")
ERRORS = (
    ("CUDA out of memory", "out of memory"), ("DefaultCPUAllocator: can't allocate", "out of memory"),
    ("SIGTERM", "ended by SIGTERM"), ("KeyboardInterrupt", "interrupted"), ("Killed", "killed"),
    ("NCCL error", "NCCL error"), ("No space left on device", "disk full"),
    ("Traceback (most recent call last)", "exception"),
)


def _logs(folder: Path, trace: Trace) -> None:
    """Bad steps, infinite losses and the end of the run from text logs."""
    paths = sorted({p for pattern in LOGS for p in folder.rglob(pattern) if p.is_file()})
    skipped = 0
    for path in paths[:50]:
        where = str(path.relative_to(folder))
        lines = _tail(path)
        for at, line in enumerate(lines):
            if match := SKIPPED.search(line):
                skipped += 1
                _skipped(trace, match)
            elif match := FORGOTTEN.search(line):
                if trace.bad is None:
                    names = [name.strip() for name in match[5].split(",")]
                    trace.bad = BadStep(int(match[1]), match[2], match[3], match[4], utterances=names)
            elif match := INFEASIBLE.search(line):
                if match[1] not in trace.infeasible:
                    trace.infeasible_seen += 1
                    if len(trace.infeasible) < 50:
                        trace.infeasible[match[1]] = (int(match[2]), int(match[3]))
            else:
                for text, kind in ERRORS:
                    if text in line:
                        last = _last_of_traceback(lines, at) if kind == "exception" else line.strip()
                        trace.messages.append((where, f"{kind}: {last[:300]}"))
                        break
        if lines:
            trace.sources.append(where)
    trace.bad_steps = max(trace.bad_steps, skipped)


def _tail(path: Path) -> list[str]:
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(size - LOG_BYTES, 0))
            return file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _skipped(trace: Trace, match: re.Match) -> None:
    """A batch that our models skipped, and said why."""
    if trace.bad is not None and trace.bad.step <= int(match[1]):
        return
    names = re.findall(r"'([^']*)'", match[4])
    bad = BadStep(int(match[1]), "loss" if match[2] == "loss" else "gradient", utterances=names)
    if "audio itself is not finite in" in match[5]:
        bad.origin = "audio"
        bad.utterances = re.findall(r"'([^']*)'", match[5]) or names
    elif found := re.search(r"(\d+) parameters are not finite any more, first (\S+)", match[5]):
        bad.origin, bad.module = "parameters", found[2].rstrip(".")
    trace.bad = bad


def _last_of_traceback(lines: list[str], at: int) -> str:
    """The error line that ends a traceback beginning at `at`."""
    for line in lines[at + 1: at + 200]:
        bare = re.sub(r"^\[?\w*\]?:?\s?", "", line) if line.startswith("[rank") else line
        if bare and not bare[0].isspace() and re.match(r"[\w.]+(Error|Exception|Interrupt|Diverged|Exit)\b", bare):
            return bare.strip()
    return lines[min(at + 1, len(lines) - 1)].strip()


# ---- checks that are not about the curve -----------------------------------------------------------------------


@check("run", faults=("input-unreadable",), needs=("run",))
def files_of_the_run(subject):
    """What a run leaves behind is there and can be read."""
    from tools.doctor import checkpoints, metrics

    trace = trace_of(subject)
    for path, why in trace.unread.items():
        if "tfevents" in path.name and trace.series:  # a run that was begun again leaves some without a scalar
            continue
        yield Finding("input-unreadable", "warning", f"{path} cannot be used: {why}.",
                      "It was cut off while it was written, it is still empty, or it is of another kind.", {},
                      ["look at the file; what else is in the folder was read"], 0.9, where=str(path))
    if trace.sources or trace.series or subject.settings or saved_report(subject.run) \
            or checkpoints.find(subject.run) or metrics.prediction_files(subject.run):
        return
    yield Finding(
        "input-unreadable", "prevents", f"{subject.run} holds nothing that a run leaves and that can be read.",
        "It is another folder, or the run ended before it wrote anything.",
        {"looked for": ["config.yaml", "curve.csv", "metrics.csv", "events.out.tfevents.*", *LOGS, "*.ckpt", "*.nemo"]},
        ["give the folder with config.yaml and curve.csv"], 1.0, where=str(subject.run), unreadable=True)


@check("run", faults=("run-ended",), needs=("run",))
def end_of_the_run(subject):
    """How the run ended."""
    trace = trace_of(subject)
    if not (trace.series or trace.messages or trace.sources):
        raise NotExamined("no curve and no log in this folder")
    last, planned = trace.last_step, trace.planned
    if not trace.messages and (planned is None or last >= 0.98 * planned or not trace.series):
        return
    if not trace.messages and not trace.ended:
        return  # it is still going
    end = trace.messages[-1] if trace.messages else None
    whole = planned is not None and last >= 0.98 * planned
    if whole and end is not None and "SIGTERM" in end[1]:
        return
    of = f" of {planned}" if planned else ""
    fixes = {
        "out of memory": ["a smaller training.global_batch_seconds, or more accumulate_grad_batches",
                          "a shorter model.train_ds.max_duration"],
        "disk full": ["fewer checkpoints: exp_manager.checkpoint_callback_params.save_top_k=1"],
    }
    kind = end[1].split(":")[0] if end else ""
    yield Finding(
        "run-ended", "note" if whole else "warning",
        f"The run's last step is {last}{of}" + (f"; its log says: {end[1]}" if end else ", and no log says why it "
        "ended."),
        "It ended before its plan." if not whole else "The plan was fulfilled; the log holds an error all the same.",
        {"last step": last, "planned": planned, "messages": [f"{where}: {line}" for where,
        line in trace.messages[-5:]]},
        fixes.get(kind, ["start it again: the same command goes on from the last checkpoint"]), 0.8 if end else 0.5)


@check("run", faults=(), needs=("run",))
def report_of_the_callback(subject):
    """What the callback had found while the run went on."""
    saved = saved_report(subject.run)
    if saved is None:
        raise NotExamined("no doctor/report.json: the callback was not attached, or the run did not reach its end")
    from tools.doctor.run import diagnose

    own = {finding.id for finding in diagnose(trace_of(subject))[0]} - set(NON_FINITE)
    for finding in saved.findings:
        if finding.id not in own and finding.id != "run-early":
            finding.evidence = {"seen by": "the callback, while it ran", **finding.evidence}
            yield finding


def saved_report(folder: Path) -> Report | None:
    """The report that the callback left in a run's folder; None where there is none that can be read."""
    path = folder / "doctor" / "report.json"
    try:
        return Report.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
