"""On the node: trains the models one after the other, each within a time budget, then averages, evaluates and reports.

A short probe measures how long a step takes there, and the number of steps is set so that the schedule ends within the
budget; it is never more than the recipe's own. What was decided stands in exp/<run>/offline/plan.json, so that the
same command goes on where it was cut: a model that is done is passed over, one that is not resumes.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from manifests.schema import read_manifest, write_atomic
from tools.offline_bundle.node import installed_index, say
from tools.offline_bundle.parts import BundleError
from tools.report.__main__ import hardware

EXIT_CUT = 75  # this sitting's time is up: the same command goes on
GRACE = 120.0  # seconds that a training asked to end gets to save itself
LEAST_PROBE = 60.0  # seconds of training that a probe may take at least, else a third of the budget
OVERRUN = 1.25  # a training that takes longer than this times its budget is ended and evaluated as it is
NOTES = "offline"  # in a run's folder


class Cut(Exception):
    """The time of this sitting is up."""


@dataclass
class Job:
    """One model to train: where, on what, and within how many seconds of training (None: the recipe's own length)."""

    model: str
    corpus: str
    manifests: Path  # folder with train.json, dev.json and the rest
    exp: Path
    seconds: float | None
    steps: int | None = None
    overrides: list[str] = field(default_factory=list)
    evaluate: list[Path] = field(default_factory=list)
    commit: str = "unknown"

    @property
    def tokenizer(self) -> Path:
        return self.exp / "tokenizer"

    @property
    def notes(self) -> Path:
        """For plan and logs. Of the files right in the run's folder NeMo moves all away when a training resumes."""
        return self.exp / NOTES

    def arguments(self, folder: Path) -> list[str]:
        """Hydra's overrides for a training in `folder`."""
        given = [f"corpus={self.corpus}", f"corpus.train={self.manifests / 'train.json'}",
                 f"corpus.validation={self.manifests / 'dev.json'}", f"exp_manager.explicit_log_dir={folder}"]
        if self.model.endswith("_bpe"):
            given.append(f"model.tokenizer.dir={self.tokenizer}")
        return given + self.overrides


class Plan:
    """What was decided and done for a job, kept in exp/<run>/offline/plan.json."""

    def __init__(self, job: Job):
        self.path = job.notes / "plan.json"
        self.facts = {"done": {}}
        if self.path.is_file():
            self.facts = json.loads(self.path.read_text())
        begun = self.facts.setdefault("overrides", job.overrides)
        if begun != job.overrides:
            raise BundleError(f"{job.exp} was begun with the overrides {' '.join(begun) or '(none)'}, now "
                              f"{' '.join(job.overrides) or '(none)'}: name another folder with --exp, or remove it")
        self.facts["model"], self.facts["corpus"] = job.model, job.corpus

    def done(self, stage: str) -> bool:
        return stage in self.facts["done"]

    def finish(self, stage: str, seconds: float, **facts) -> None:
        self.facts["done"][stage] = {"seconds": round(seconds, 1), **facts}
        self.save()

    def save(self) -> None:
        write_atomic(self.path, (json.dumps(self.facts, indent=1) + "\n").encode())


class Runner:
    """Runs the stages' programs with one log a run, until the sitting's deadline (monotonic seconds)."""

    def __init__(self, deadline: float | None = None):
        self.deadline = deadline

    def __call__(self, arguments: list[str], log: Path, limit: float | None = None,
                 since: Path | None = None) -> tuple[int, bool]:
        """(exit status, whether `limit` seconds were over and it was asked to end). Raises Cut at the deadline.

        The seconds count from the moment that the program writes the file `since`, where that is given: a training
        spends some on imports before it begins its curve.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        if self.deadline is not None and time.monotonic() >= self.deadline:
            raise Cut
        begin, over, started = time.monotonic(), False, time.time()
        with open(log, "ab") as file:
            file.write(f"\n$ python -m {' '.join(arguments)}\n".encode())
            file.flush()
            process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=file, stderr=subprocess.STDOUT)
            try:
                while process.poll() is None:
                    now = time.monotonic()
                    cut = self.deadline is not None and now >= self.deadline
                    if since is not None and not (since.is_file() and since.stat().st_mtime >= started):
                        begin = now
                    over = limit is not None and now - begin >= limit
                    if cut or over:
                        self._end(process)
                        if cut and process.returncode != 0:
                            raise Cut
                        break
                    time.sleep(0.2)
            except BaseException:
                if process.poll() is None:
                    self._end(process)
                raise
        return process.returncode, over

    @staticmethod
    def _end(process: subprocess.Popen) -> None:
        """Asks a training to save and end; ends it where it does not."""
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def last_line(log: Path) -> str:
    """The last words of a log, for a message."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def step_times(curve: Path, skip: int) -> tuple[float, float | None, int]:
    """(seconds a step after the first `skip`, seconds a validation or None, steps trained) from a curve.csv.

    Raises BundleError where it is too short to tell.
    """
    rows = []
    if curve.is_file():
        with open(curve, newline="") as file:
            rows = [(int(row["step"]), float(row["seconds"]), bool(row["val_wer"])) for row in csv.DictReader(file)]
    trained = [(step, seconds) for step, seconds, validation in rows if not validation]
    late = [point for point in trained if point[0] >= skip] or trained
    if len(late) < 2:
        late = trained
    if len(late) < 2:
        raise BundleError(f"{curve}: {len(trained)} rows, too few to measure a step: give --steps instead")
    each = (late[-1][1] - late[0][1]) / (late[-1][0] - late[0][0])
    end, at = trained[-1]
    validations = [seconds - at for step, seconds, validation in rows if validation and step == end]
    return each, max(validations, default=None), end


def steps_within(budget: float, each: float, validation: float, first_pass: float, validations: int, most: int) -> int:
    """Steps that fit into `budget` seconds of training: at most the recipe's `most`, a multiple of `validations`.

    `first_pass` is what the first pass over the data takes beyond its steps (features computed, kernels compiled).
    """
    count = max(min(validations, most), 1)
    steps = min(int((budget - first_pass - count * validation) / each), most)
    return max(steps - steps % count, count)


class Length(NamedTuple):
    """A recipe's own length, as recipes.train counts: steps in all and in one pass over the data, validations, and how
    many times the audio of a step there is in one validation."""

    steps: int
    one_pass: int
    validations: int
    validation_steps: float


def full_length(job: Job) -> Length:
    """Of the recipe with the job's overrides. Raises BundleError for a configuration that cannot train."""
    from recipes.config import ConfigError, compose

    try:
        cfg = compose(job.model, job.arguments(job.exp))
    except ConfigError as error:
        raise BundleError(str(error)) from error
    train, batch_seconds = cfg.model.train_ds, cfg.training.global_batch_seconds
    seconds = sum(row["duration"] for row in read_manifest(train.manifest_filepath)
                  if train.min_duration <= row["duration"] <= train.max_duration)
    one_pass = max(round(seconds / batch_seconds), 1)
    most = cfg.trainer.max_steps if cfg.trainer.max_steps > 0 else max(int(one_pass * cfg.training.epochs), 1)
    validated = sum(row["duration"] for row in read_manifest(cfg.model.validation_ds.manifest_filepath))
    return Length(most, one_pass, int(cfg.training.validations), validated / batch_seconds)


def probe(job: Job, plan: Plan, run: Runner) -> None:
    """Trains a little in a folder of its own and decides the number of steps."""
    begin = time.monotonic()
    length = full_length(job)
    if job.steps:
        plan.facts.update(steps=job.steps, why="as asked")
        plan.finish("probe", 0.0)
        return
    if job.seconds is None:
        plan.facts.update(steps=None, why=f"the recipe's own length, about {length.steps}")
        plan.finish("probe", 0.0)
        return
    folder = job.exp / ".probe"
    shutil.rmtree(folder, ignore_errors=True)
    # The first pass also computes features and compiles: it says little.
    steps = min(length.one_pass + 60, length.steps)
    arguments = ["recipes.train", "--config-name", job.model, *job.arguments(folder), f"trainer.max_steps={steps}",
                 "training.validations=1"]
    limit = max(job.seconds / 3, LEAST_PROBE)
    status, over = run(arguments, job.notes / "probe.log", limit, folder / "curve.csv")
    if status and not over:
        log = job.notes / "probe.log"
        raise BundleError(f"{job.model}: the probe failed with status {status}: {last_line(log)}; the log is {log}")
    each, validation, trained = step_times(folder / "curve.csv", length.one_pass)
    first_pass = max(_seconds_at(folder / "curve.csv", trained) - trained * each, 0.0)
    told = "a validation"
    if validation is None:
        # The probe was at its limit before it validated. A validation reads audio and computes features, as the first
        # pass does, and of a step it has no backward pass: the two together are its upper bound.
        validation = length.validation_steps * (each + first_pass / min(trained, length.one_pass))
        told = "a validation at most (the probe ended before its own)"
    chosen = steps_within(job.seconds, each, validation, first_pass, length.validations, length.steps)
    plan.facts.update(steps=chosen, seconds_a_step=round(each, 4), seconds_a_validation=round(validation, 2),
                      first_pass=round(first_pass, 1), budget=job.seconds,
                      why=f"{each:.3f} s a step, {validation:.1f} s {told}; the recipe's own length is {length.steps}")
    shutil.rmtree(folder, ignore_errors=True)
    plan.finish("probe", time.monotonic() - begin)


def _seconds_at(curve: Path, step: int) -> float:
    with open(curve, newline="") as file:
        rows = [row for row in csv.DictReader(file) if not row["val_wer"]]
    return max(float(row["seconds"]) for row in rows if int(row["step"]) <= step)


def run_job(job: Job, run: Runner) -> str:
    """All stages of one model that are not done yet; returns a line on the result.

    Raises BundleError where a stage fails, with its log's last line; Cut at the sitting's deadline.
    """
    plan = Plan(job)
    plan.facts.setdefault("hardware", hardware())
    plan.facts["commit"] = job.commit
    plan.save()
    nemo = job.exp / f"{job.model}.nemo"
    log = job.notes / "train.log"

    def stage(name: str, arguments: list[str], limit: float | None = None, since: Path | None = None) -> None:
        if plan.done(name):
            return
        begin = time.monotonic()
        status, over = run(arguments, log, limit, since)
        if status and not over:
            raise BundleError(f"{job.model}: {name} failed with status {status}: {last_line(log)}; the log is {log}")
        plan.finish(name, time.monotonic() - begin, **({"ended_by": "the budget"} if over and status else {}))

    if job.model.endswith("_bpe"):
        stage("tokenizer", ["manifests.tokenizer", str(job.manifests / "train.json"), "--out", str(job.tokenizer)])
    asked = {"seconds": job.seconds, "steps": job.steps}
    if plan.done("probe") and plan.facts.get("asked", asked) != asked:
        say(f"{job.model}: goes on with {plan.facts['steps'] or 'all'} steps decided before, whatever is asked "
            f"now; to begin anew remove {job.exp}")
    if not plan.done("probe"):
        plan.facts["asked"] = asked
        probe(job, plan, run)
        say(f"{job.model}: {plan.facts['steps'] or 'all'} steps ({plan.facts['why']})")
    steps = [f"trainer.max_steps={plan.facts['steps']}"] if plan.facts["steps"] else []
    limit = None
    if job.seconds and not job.steps:
        limit = max(OVERRUN * job.seconds - _trained_seconds(job.exp / "curve.csv"), 30.0)
    stage("train", ["recipes.train", "--config-name", job.model, *job.arguments(job.exp), *steps], limit,
          job.exp / "curve.csv")
    stage("average", ["recipes.average", str(job.exp), "--out", str(nemo)])
    listed = ",".join(map(str, job.evaluate))
    stage("evaluate", ["recipes.evaluate", f"model={nemo}", f"manifests=[{listed}]", f"output={job.exp / 'evaluation'}",
                       "pairs=0"])
    stage("report", ["tools.report", str(job.exp)])
    stage("weights", ["tools.offline_bundle.weights", str(nemo), str(job.exp / f"{job.model}-fp16.nemo"),
                      "--manifest", str(job.manifests / "dev.json")])
    return result_line(job, plan)


def _trained_seconds(curve: Path) -> float:
    try:
        return float(curve.read_text().splitlines()[-1].split(",")[1])
    except (OSError, IndexError, ValueError):
        return 0.0


def result_line(job: Job, plan: Plan) -> str:
    """WER by manifest, and where the time went."""
    metrics = json.loads((job.exp / "evaluation" / "metrics.json").read_text())
    parts = [f"{one['name']} {one['wer']:.1%}" for one in metrics["manifests"] if one["wer"] is not None]
    took = ", ".join(f"{name} {facts['seconds']:.0f} s" for name, facts in plan.facts["done"].items())
    return f"{job.model}: WER {', '.join(parts)} ({took})"


def run_all(jobs: list[Job], stop_after: float | None = None) -> int:
    """Runs the jobs in order; a failed one does not stop the others. Returns 0, 1 (something failed) or EXIT_CUT."""
    run = Runner(None if stop_after is None else time.monotonic() + stop_after)
    signal.signal(signal.SIGTERM, _as_cut)
    failed = []
    for job in jobs:
        say(f"{job.model} on {job.corpus}: {job.exp}")
        try:
            say(run_job(job, run))
        except BundleError as error:
            print(f"train: {error}", file=sys.stderr, flush=True)
            failed.append(job.model)
        except Cut:
            say(f"{job.model}: cut, saved; the same command goes on from here")
            return EXIT_CUT
    if failed:
        print(f"train: failed: {', '.join(failed)}; the same command tries again", file=sys.stderr)
    return 1 if failed else 0


def _as_cut(signum, frame):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt the training's saving
    raise Cut


def make_jobs(dest: Path, models: list[str], corpus: str, minutes: float | None, steps: int | None,
              evaluate: list[Path], overrides: list[str], exp: Path | None = None) -> list[Job]:
    """Jobs from the options of `train`. An override MODEL:KEY=VALUE is for that model alone. Raises BundleError."""
    from recipes.config import recipes

    folder = dest / "corpora" / corpus
    for name in ("train.json", "dev.json"):
        if not (folder / name).is_file():
            raise BundleError(f"{folder / name}: no such manifest; in the bundle: {_listed(dest / 'corpora')}")
    unknown = [model for model in models if model not in recipes()]
    if unknown:
        raise BundleError(f"--models {unknown[0]}: valid are {', '.join(recipes())}")
    for path in evaluate:
        if not path.is_file():
            raise BundleError(f"--evaluate {path}: no such manifest")
    if _gpu() and not any(text.startswith("trainer=") for text in overrides):
        overrides = ["trainer=gpu", *overrides]
    tests = evaluate or sorted(path for path in folder.glob("*.json") if path.name != "train.json")
    jobs = []
    for model in models:
        own = [text.removeprefix(f"{model}:") for text in overrides
               if text.startswith(f"{model}:") or text.split(":")[0] not in recipes()]
        run = (exp or dest / "exp") / f"{model}_{corpus}"
        jobs.append(Job(model, corpus, folder, run, minutes * 60 if minutes else None, steps, own,
                        [path.absolute() for path in tests], installed_index(dest)["commit"]))
    return jobs


def _gpu() -> bool:
    """Whether there is an NVIDIA GPU; torch is not asked, it takes seconds to import."""
    listed = bool(shutil.which("nvidia-smi")) and not subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode
    return listed or Path("/dev/nvidia0").exists()  # a container may lack the program


def _listed(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "none"


def main(arguments: list[str]) -> int:
    """`arguments`: one JSON object with make_jobs' arguments, as tools.offline_bundle.__main__ hands them over."""
    options = json.loads(arguments[0])
    stop_after = options.pop("stop_after")
    paths = {key: Path(options[key]) if options[key] else None for key in ("dest", "exp")}
    options |= {**paths, "evaluate": [Path(path) for path in options["evaluate"]]}
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    try:
        return run_all(make_jobs(**options), stop_after * 60 if stop_after else None)
    except Cut:
        return EXIT_CUT
    except BundleError as error:
        print(f"train: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
