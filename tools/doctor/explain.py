"""Reads what a run left behind into a Trace: curve.csv of ours, CSV logs, TensorBoard events, text logs; where there is
no other curve, the one that a text log shows.

`python -m tools.doctor explain RUN_DIR` runs the checks of the families "run" and "metrics" on it, and those of the
data and the schedule on what its configuration names. Nothing is unpickled but tensors. Torch and TensorBoard are
imported only where there are files for them.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

from tools.doctor import folders, saved, units
from tools.doctor.bands import corpus_of
from tools.doctor.chain import chained, from_nothing
from tools.doctor.curves import STEP_NAMES, joined, read_csv, read_events
from tools.doctor.finding import Finding
from tools.doctor.logs import LOGS, begins_anew, goes_on, log_files, read_logs, run_ended
from tools.doctor.printed import Printed
from tools.doctor.registry import NotExamined, check
from tools.doctor.trace import Points, Trace

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


def trace_of(subject) -> Trace:
    """The trace of `subject.run`, read once; of several runs in that folder the newest."""
    trace = subject.__dict__.get("_trace")
    if trace is None:
        _choose_run(subject)
        trace = subject.__dict__["_trace"] = read_run(subject.run, subject.settings,
            lambda: subject.rows.get("train", []))
    return trace


def _choose_run(subject) -> None:
    """Where the folder holds several runs, the subject is the newest from here on: merged, they would be none."""
    newest, every = folders.newest_of(subject.run)
    if every:
        subject.__dict__["_several"] = (subject.run, every)
        subject.run = newest
        if subject.settings is None:
            subject._open_config()
            subject._open_manifests()


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
    named = {series: next((n for n in names if columns.get(n)), None) for series, names in NAMES.items()}
    for series, name in named.items():
        if name is not None:
            trace.series[series] = sorted(columns[name], key=lambda p: p[0])
    texts = [str(row.get("text", "")) for row in train_rows()]
    trace.spaces = units.spaces(texts)
    if named["loss"] is not None:
        _unit(trace, named["loss"], texts)
    _take_watched(trace, folder / "doctor" / "curve.csv")
    _take_printed(trace, read_logs(folder, trace), texts)
    for path, report in saved.reports(folder).values():
        if report is None:
            trace.unread[path] = "no report of the doctor"
    trace.reported = {finding.id for finding in saved.findings(folder, trace.last_step) if not saved.passed(finding)}
    last = trace.last_step
    # Without a plan nothing says that it is over but that no more is written.
    trace.ended = bool(trace.planned) and last >= 0.98 * trace.planned or _quiet_for(folder) > 3600
    return trace


def _take_watched(trace: Trace, path: Path) -> None:
    """What the callback measured, where the trainer has not logged it, or has logged a loss of which nothing is
    known."""
    watched = read_csv(path) if path.is_file() else {}
    measured = bool(watched.get("loss") and watched.get("level"))
    for name, points in watched.items():
        if name not in trace.series or name == "loss" and measured and trace.loss_unit == "unknown":
            trace.series[name] = points
            if name == "loss":
                trace.loss_unit = "label"  # its level was measured
    if levels := trace.values("level"):
        trace.level = median(levels) if trace.loss_unit != "unknown" else None


def _take_printed(trace: Trace, printed: Printed, texts: list[str]) -> None:
    """What a text log shows of the curve, where nothing else holds a loss."""
    if "loss" in trace.series:
        return
    for series, names in NAMES.items():
        name = next((name for name in names if name in printed.columns), None)
        if name is not None and series not in trace.series:
            trace.series[series] = printed.columns[name]
            if series == "loss":
                trace.places = printed.places
                if printed.placed:  # the lines of others are no steps, and no plateau is told by their number
                    _unit(trace, name, texts)


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
        trace.recipe = str(settings.get("name", ""))
        trace.corpus = corpus_of(str(settings.get("corpus.name", "")), settings.get("model.train_ds.manifest_filepath"))


# ---- curves ----------------------------------------------------------------------------------------------------


def _columns(folder: Path, trace: Trace) -> dict[str, Points]:
    """Column -> points, from our curve, else CSV logs; what they lack from TensorBoard. Sources go into the trace."""
    logged = _event_columns(folder, folders.events(folder), trace)
    curve = folder / "curve.csv"
    for paths in ([curve] if curve.is_file() else [], folders.csv_logs(folder)):
        if columns := joined(_csv_columns(folder, paths, trace)):
            known = {series for series, names in NAMES.items() if any(columns.get(name) for name in names)}
            more = [name for series, names in NAMES.items() if series not in known for name in names if name in logged]
            return {**columns, **{name: logged[name] for name in more}}
    return logged


def _csv_columns(folder: Path, paths: list[Path], trace: Trace):
    """Columns of each CSV that has some; sources and what cannot be used go into the trace."""
    for path in paths:
        if columns := read_csv(path):
            trace.sources.insert(0, str(path.relative_to(folder)))
            yield columns
        else:
            trace.unread[path] = f"no numbers under a column of steps ({', '.join(STEP_NAMES[:2])})"


def _event_columns(folder: Path, events: list[Path], trace: Trace) -> dict[str, Points]:
    """Columns of TensorBoard files, oldest first; the wait for data goes into the trace."""
    sittings = []
    for path in events[-20:]:
        found, waits = read_events(path)
        if found:
            trace.sources.append(str(path.relative_to(folder)))
        else:
            trace.unread[path] = "no scalars of TensorBoard"
        sittings.append(found)
        if waits:
            trace.series.setdefault("wait", []).extend(waits)
    return joined(sittings)


def _unit(trace: Trace, name: str, texts: list[str]) -> None:
    """The loss in nats a character or a token where the name or the configuration and the train texts allow it, and its
    level by how often these occur."""
    settings = trace.settings
    tokens = settings is not None and settings.get("model.tokenizer") is not None
    counted = (units.of_tokens(texts, settings.tokenizer_dir) if tokens else
               units.of_characters(texts, settings.labels if settings is not None else None))
    reduction = settings.get("model.ctc_reduction", "mean_batch") if settings is not None else ""
    if name == "loss_per_char" or settings is not None and settings.recipe or reduction == "mean_volume":
        trace.loss_unit = "label" if tokens else "character"
    elif reduction == "mean_batch" and counted is not None:  # the mean of sums over each utterance
        for name in ("loss", "val_loss"):  # the same module computes both
            if name in trace.series:
                trace.series[name] = [(step, value / counted.mean) for step, value in trace.series[name]]
        trace.loss_unit = "label" if tokens else "character"
    if trace.loss_unit != "unknown" and counted is not None:
        trace.level = counted.level


def _quiet_for(folder: Path) -> float:
    """Seconds since anything in the folder's curves or logs was written."""
    files = [p for pattern in ("curve.csv", "metrics.csv", "events.out.tfevents.*", *LOGS) for p
        in folder.rglob(pattern)]
    return time.time() - max((p.stat().st_mtime for p in files), default=0.0)


# ---- checks that are not about the curve -----------------------------------------------------------------------


@check("run", faults=("input-unreadable",), needs=("run",))
def files_of_the_run(subject):
    """What a run leaves behind is there and can be read."""
    from tools.doctor import checkpoints, metrics

    trace = trace_of(subject)
    if several := subject.__dict__.get("_several"):
        one = _never_resumed(subject) or chained(several[1], read_run)
        yield _several_runs(*several, subject.run, 0.8 if one else 0.9)
    for path, why in trace.unread.items():
        if "tfevents" in path.name and trace.series:  # a run that was begun again leaves some without a scalar
            continue
        yield Finding("input-unreadable", "warning", f"{path} cannot be used: {why}.",
                      "It was cut off while it was written, it is still empty, or it is of another kind.", {},
                      ["look at the file; what else is in the folder was read"], 0.9, where=str(path))
    nothing = not (_told(trace) or subject.settings or saved.readable(subject.run) or checkpoints.find(subject.run)
                   or metrics.prediction_files(subject.run))
    if not trace.series and (wandb := sorted(subject.run.rglob("*.wandb"))):
        yield _only_wandb(subject.run, wandb, nothing)
    elif nothing:
        yield _nothing_told(subject.run)


def _told(trace: Trace) -> bool:
    """Whether the curves and logs of a run say anything of it."""
    return bool(trace.series or trace.messages or trace.bad or trace.infeasible_seen or trace.hypotheses)


def _nothing_told(run: Path) -> Finding:
    looked = ["config.yaml", "curve.csv", "metrics.csv", "events.out.tfevents.*", *LOGS, "*.ckpt", "*.nemo"]
    logs = [str(path.relative_to(run)) for path in log_files(run)]
    if not logs:
        return Finding(
            "input-unreadable", "prevents", f"{run} holds nothing that a run leaves and that can be read.",
            "It is another folder, or the run ended before it wrote anything.", {"looked for": looked},
            ["give the folder with config.yaml and curve.csv"], 1.0, where=str(run), unreadable=True)
    return Finding(
        "input-unreadable", "prevents",
        f"{run} holds text logs and nothing else, and no loss, hypothesis or error is in them.",
        "The run logged its losses elsewhere, ended before the first, or writes them in a form that is not known here.",
        {"logs": logs[:8], "read from logs": ["Epoch 5:  45%|...| 37/81 [..., train_loss=1.23]", "step 246 loss 1.23",
                                              "WER predicted: ..."], "looked for": looked},
        ["give the folder with metrics.csv or events.out.tfevents.*",
         "exp_manager.create_tensorboard_logger=true (NeMo), logger=csv (our recipes) write a curve"], 1.0,
        where=str(run), unreadable=True)


def _only_wandb(run: Path, files: list[Path], nothing: bool) -> Finding:
    """W&B's log as the only one that holds the curve."""
    return Finding(
        "input-unreadable", "prevents" if nothing else "warning",
        f"The curve is in {files[-1].relative_to(run)} alone, W&B's binary file, which is not read here.",
        "W&B keeps what was logged in a format of its own and gives it out again from its server.",
        {"files": [str(path.relative_to(run)) for path in files[:8]]},
        [f"wandb sync {files[-1].parent} (of an offline run), then wandb.Api().run('ENTITY/PROJECT/ID').history("
         f"samples=100000).to_csv('{run / 'metrics.csv'}'), then this command again",
         "exp_manager.create_tensorboard_logger=true beside W&B (NeMo), logger=csv (our recipes), for the next run"],
        1.0, where=str(files[-1]), unreadable=nothing)


def _several_runs(folder: Path, every: list[Path], taken: Path, confidence: float) -> Finding:
    names = [str(path.relative_to(folder)) for path in every]
    return Finding(
        "input-unreadable", "warning",
        f"{folder} holds {len(every)} runs: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}; only "
        f"{taken.relative_to(folder)}, the newest, is examined.",
        "Each of them begins at step 0, so their curves are not one.", {"runs": names},
        [f"python -m tools.doctor explain {path}" for path in every if path != taken][:4], confidence,
        where=str(folder))


def _never_resumed(subject) -> list[Path]:
    """The runs of a folder, where they are one run that was begun again and again from step 0: alike in their
    configuration, none of them left a checkpoint, or none has taken over what the one before left."""
    from tools.doctor import checkpoints

    top, every = subject.__dict__.get("_several", (subject.run, []))
    known = {name: [(path / name).read_bytes() for path in every if (path / name).is_file()]
             for name in ("config.yaml", "hparams.yaml")}
    alike = any(len(texts) == len(every) and len(set(texts)) == 1 for texts in known.values())
    anew = all(folders.begin(path) < folders.LATER for path in every)
    return every if alike and anew and (not checkpoints.find(top) or from_nothing(every, read_run)) else []


@check("run", faults=("run-ended",), needs=("run",))
def end_of_the_run(subject):
    """How the run ended."""
    from tools.doctor import checkpoints

    trace = trace_of(subject)
    if not (trace.series or trace.messages):
        raise NotExamined("no curve in this folder, and no log says how it ended")
    if (again := chained(subject.__dict__.get("_several", (None, []))[1], read_run)) is not None:
        yield again
        return
    if "run-ended" in trace.reported:
        return  # the callback has seen it
    last, planned = trace.last_step, trace.planned
    if not trace.messages and (planned is None or last >= 0.98 * planned or not trace.series):
        return
    anew = _never_resumed(subject)
    if not trace.messages and not trace.ended and len(anew) < 3:
        return  # it is still going
    end = trace.messages[-1][1] if trace.messages else ""
    if planned is not None and last >= 0.98 * planned and "SIGTERM" in end:
        return
    said = f"; its log says: {end}" if end else ", and no log says why it ended."
    evidence = {"messages": [f"{where}: {line}" for where, line in trace.messages[-5:]]}
    if anew:
        yield begins_anew(len(anew), last, planned, said, evidence)
        return
    again = goes_on(bool(trace.recipe), bool(checkpoints.find(subject.run)))
    yield run_ended(last, planned, said, end, evidence, 0.8 if end else 0.5, again, subject.settings)


@check("run", faults=(), needs=("run",))
def report_of_the_callback(subject):
    """What the callback had found while the run went on."""
    trace = trace_of(subject)
    if not saved.readable(subject.run):
        raise NotExamined("no doctor/report.json: the callback was not attached, or the run was killed in its first "
                          "minute")
    from tools.doctor.run import diagnose

    own = {finding.id for finding in diagnose(trace)[0]}
    for finding in saved.findings(subject.run, trace.last_step):
        # Where something was not finite the callback has seen more than the curve shows, unless that was long ago.
        better = finding.id in saved.NON_FINITE and not saved.passed(finding)
        if (better or finding.id not in own) and finding.id != "run-early":
            finding.evidence = {"seen by": "the callback, while it ran", **finding.evidence}
            yield finding
