"""Text logs of a run: batches that were not finite, losses that were infinite, how it ended, and what was printed of
its curve. Standard library only."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from tools.doctor.finding import Finding, Report
from tools.doctor.printed import Printed
from tools.doctor.trace import BadStep, Trace

log = logging.getLogger("doctor")

LOGS = ("*.log", "*.txt", "*.out", "*.err")
LOG_BYTES = 20_000_000  # of one log, from its end
NO_LOGS = ("git-info.log", "cmd-args.log")  # of exp_manager: a diff of the code, and the command
NOW = 10**9  # number of the sitting whose logs have not been moved

# What is read from a line -> pattern. Ours, NeMo's, Lightning's, torch's.
SKIPPED = re.compile(r"step (\d+): (loss|gradient norm) is (\S+): batch skipped.*?utterances (\[.*?\])(.*)")
INFEASIBLE = re.compile(r"utterance (\S+): CTC loss is infinite, (\d+) targets .*?into (\d+) output frames")
FORGOTTEN = re.compile(r"doctor: step (\d+): (\S+) is not finite; origin: (\S+) (\S*); utterances (.*)")
ERRORS = (
    ("CUDA out of memory", "out of memory"), ("DefaultCPUAllocator: can't allocate", "out of memory"),
    ("oom_kill", "killed for its memory"), ("oom-kill", "killed for its memory"), ("Out Of Memory", "killed for its memory"),
    ("DUE TO TIME LIMIT", "ended by the time limit of the queue"), ("DUE TO PREEMPTION", "preempted by the queue"),
    ("Watchdog caught collective operation timeout", "a device waited for the others in vain"),
    ("Bus error", "shared memory full"),
    ("SIGTERM", "ended by SIGTERM"), ("KeyboardInterrupt", "interrupted"), ("Killed", "killed"),
    ("Signaling Trainer to stop", "ended by early stopping"), ("NCCL error", "NCCL error"), ("No space left on device", "disk full"),
    ("Traceback (most recent call last)", "exception"),
)


def read_logs(folder: Path, trace: Trace) -> Printed:
    """Bad steps, infinite losses and the end of the run from text logs; returns the curve that they show."""
    skipped = 0
    batches = trace.settings.number("trainer.accumulate_grad_batches") if trace.settings is not None else None
    printed = Printed(max(int(batches or 1), 1), losses="loss" not in trace.series)
    for path in log_files(folder)[-50:]:
        where = str(path.relative_to(folder))
        lines = _tail(path)
        printed.read(lines)
        for at, line in enumerate(lines):
            if match := SKIPPED.search(line):
                skipped += 1
                _skipped(trace, match)
            elif match := FORGOTTEN.search(line):
                if trace.bad is None:
                    names = [name.strip() for name in match[5].split(",")]
                    trace.bad = BadStep(int(match[1]), match[2], match[3], match[4], utterances=names)
                    trace.bad_steps = max(trace.bad_steps, 1)  # the line is written once, however many follow
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
    printed.close()
    trace.hypotheses = printed.hypotheses
    return printed


def log_files(folder: Path) -> list[Path]:
    """Text logs below a folder, oldest first.

    NeMo's exp_manager moves those of earlier sittings to run_0, run_1, ...: how these ended says nothing of a run that
    was begun again, and only the last of them counts where there is no other.
    """
    found = {p for pattern in LOGS for p in folder.rglob(pattern) if p.is_file() and p.name not in NO_LOGS}
    sittings: dict[int, list[Path]] = {}
    for path in found:
        moved = [int(part[4:]) for part in path.relative_to(folder).parts[:-1] if re.fullmatch(r"run_\d+", part)]
        sittings.setdefault(moved[0] if moved else NOW, []).append(path)
    return sorted(sittings[max(sittings)], key=lambda p: (p.stat().st_mtime, str(p))) if sittings else []


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


# ---- the end ---------------------------------------------------------------------------------------------------

# Under "out of memory" the batch is named as the configuration has it (smaller).
WAYS_OUT = {
    "out of memory": ["a shorter model.train_ds.max_duration"],
    "killed for its memory": ["fewer model.train_ds.num_workers, each of which holds the manifest",
                              "more of the machine's memory: sbatch --mem, docker run --memory"],
    "shared memory full": ["docker run --shm-size=8g (or --ipc=host): batches go through /dev/shm",
                           "fewer model.train_ds.num_workers"],
    "a device waited for the others in vain": [
        "look at the logs of the other ranks: one has ended, has fewer batches, or waits for its data",
        "the same number of batches for each device; a longer timeout only where all are at work: "
        "DDPStrategy(timeout=timedelta(hours=1))"],
    "ended by early stopping": ["a longer patience: word error rates stay at 1.0 for some epochs before they fall",
                                "min_delta and mode that fit what it watches: mode=min for val_wer and val_loss"],
    "disk full": ["fewer checkpoints: exp_manager.checkpoint_callback_params.save_top_k=1"],
}


RESUME = "exp_manager.resume_if_exists=true exp_manager.resume_ignore_no_checkpoint=true"


def goes_on(ours: bool, checkpoint: bool) -> list[str]:
    """The change where nothing else is known: to start again, by whether it is a recipe of ours and what is there to go
    on from."""
    if ours:
        return ["start it again: the same command goes on from the last checkpoint" if checkpoint else
                "start it again: no checkpoint is there yet, so it begins anew"]
    if checkpoint:
        return [f"start it again with {RESUME} (NeMo), or trainer.fit(..., ckpt_path=the last checkpoint)"]
    return [f"no checkpoint is there to go on from: exp_manager.create_checkpoint_callback=true {RESUME}, and a "
            "checkpoint more often than it is ended"]


def begins_anew(times: int, last: int, planned: int | None, said: str, evidence: dict) -> Finding:
    """The finding of a run that was started so many times and never went on."""
    return Finding(
        "run-ended", "warning",
        f"It was started {times} times, each time from step 0, and never resumed; the newest came to step {last}"
        f"{f' of {planned}' if planned else ''}{said}",
        "Each start has the same configuration and none left a checkpoint, or none took over the one before's: what was "
        "trained before its end is lost, and a run that is ended sooner than it is done never gets done.",
        {"starts": times, "last step": last, "planned": planned, **evidence},
        [RESUME, "exp_manager.create_checkpoint_callback=true, with a checkpoint more often than the run is ended: "
         "exp_manager.checkpoint_callback_params.every_n_train_steps=" + str(max(last // 4, 1))], 0.9)


def smaller(settings) -> list[str]:
    """Ways to a batch that needs less memory, by the keys that the configuration has."""
    keys = ("training.global_batch_seconds", "model.train_ds.batch_duration", "model.train_ds.batch_size")
    there = [settings.key(key) for key in keys if settings is not None and settings.get(key)]
    return [f"a smaller {there[0] if there else 'model.train_ds.batch_size (batch_duration with lhotse)'}, with more "
            "trainer.accumulate_grad_batches"]


def never_began(trainer, folder: Path | None) -> Report:
    """The report of a fit() that was over before its first batch; written where no earlier one would be lost."""
    step, epoch = trainer.global_step, trainer.current_epoch
    limit = (f"trainer.max_steps={trainer.max_steps}" if 0 <= trainer.max_steps <= step else
             f"trainer.max_epochs={trainer.max_epochs}" if step or trainer.max_epochs == 0 else "")
    found = Finding(
        "run-ended", "warning",
        f"Training never began: the checkpoint that it goes on from is at step {step} (epoch {epoch}), and {limit} is reached."
        if limit else "Training never began: there is no batch to train on.",
        "fit() restores how far the run had come, and ends at once: not a weight is moved." if limit else
        "The loader is empty: filters (min_duration, max_duration) or a batch larger than the corpus with drop_last leave "
        "nothing, or trainer.limit_train_batches is 0.",
        {"step": step, "epoch": epoch, "goes on from": str(trainer.ckpt_path or "-")},
        [f"{limit.partition('=')[0]} beyond that, to go on",
         "another folder, or exp_manager.resume_if_exists=false, for a new run; init_from_ptl_ckpt for its weights alone"]
        if limit else ["look at len(trainer.train_dataloader), and at what the manifest's filters leave"], 0.95)
    report = Report([found], ["run: the live trainer"])
    log.warning("doctor: %s: %s Change: %s", found.id, found.symptom, found.fix[0])
    path = None if folder is None else folder / "doctor" / "report.json"
    if path is not None and trainer.is_global_zero and not path.exists():
        try:
            report.save(path)
        except OSError as error:
            log.warning("doctor: the report cannot be written to %s: %s", path, error)
    return report


def run_ended(last: int, planned: int | None, said: str, error: str, evidence: dict, confidence: float,
              again: list[str], settings=None) -> Finding:
    """The finding of a run that came to its end before its plan, or with an error.

    Args:
        last, planned: steps.
        said: how the symptom ends: by what it is known.
        error: what ended it, "" where not known.
        evidence: beside the steps.
        again: the changes where what ended it asks for none.
        settings: configs.Settings or None, for the keys that are named.
    """
    whole = planned is not None and last >= 0.98 * planned
    kind = next((kind for text, kind in ERRORS if kind in WAYS_OUT and (text in error or error.startswith(kind))), "")
    return Finding(
        "run-ended", "note" if whole else "warning",
        f"The run's last step is {last}{f' of {planned}' if planned else ''}{said}",
        "It ended before its plan." if not whole else "The plan was fulfilled; the log holds an error all the same.",
        {"last step": last, "planned": planned, **evidence},
        [*(smaller(settings) if kind == "out of memory" else []), *WAYS_OUT.get(kind, again)], confidence)


def ended_by(error: BaseException, trace: Trace, savers) -> Finding:
    """The finding of the error that ended a run; less sure than its cause, which is to come first.

    `savers`: the trainer's callbacks for checkpoints.
    """
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".removesuffix(": ")
    again = goes_on(bool(trace.recipe), any(getattr(saver, "best_model_path", "") for saver in savers))
    return run_ended(trace.last_step, trace.planned, f"; it was ended by {text}", text, {"error": text}, 0.5, again,
                     trace.settings)
