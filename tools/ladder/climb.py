"""Climbs the rungs of a recipe one after the other, each by the recipe's own training, and keeps what was measured.

    OUT/<rung>/    train.json, sample.json   what it trains on, and the part of it on which the error is measured
                   command.json              what was asked for: another command does not go on in this folder
                   run/                      the training, but of `all`
                   train.log, curve.csv      of all sittings
                   evaluation/               predictions and metrics on the sample and on dev
                   rung.json                 the result; written last, so a rung that has it is complete
    OUT/ladder.json, ladder.md, ladder.png   all rungs so far, see tools/ladder/table.py

The rung `all` trains in the recipe's own folder (exp_manager.explicit_log_dir), where `run.sh` trains as well: a run
that is there goes on, and one that is complete is not trained again.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shlex
import shutil
from pathlib import Path

from manifests.schema import read_manifest, resolve_audio, show, write_atomic, write_manifest
from recipes.config import ROOT, ConfigError, compose
from tools.ladder.batch import RungFailed, climb_with_model
from tools.ladder.process import Interrupted, TrainingFailed, train
from tools.ladder.rungs import (
    SAMPLE, Rung, duration, identity, key_of, override_lines, quote, settings, spread, subset, usable
)
from tools.ladder.table import write
from tools.ladder.verdict import Course, failed, passed

__all__ = ["Interrupted", "Ladder", "TrainingFailed", "climb"]

DIVERGED, CONFIG = 3, 2  # of recipes/train.py
FOLDER = "exp_manager.explicit_log_dir"


def climb(ladder: "Ladder", rungs: list[Rung], max_steps: int | None = 1000) -> bool:
    """The batch (in at most `max_steps` steps; None leaves it out) and then `rungs`, up to the first that fails.

    Returns whether all were climbed; `ladder.results` has what was measured. Raises ConfigError, TrainingFailed,
    Interrupted, and ManifestError for a manifest or audio that cannot be read.
    """
    steps = [lambda: ladder.batch(max_steps)] if max_steps is not None else []
    for step in steps + [lambda rung=rung: ladder.rung(rung) for rung in rungs]:
        ladder.results.append(step())
        write(ladder.out, ladder.about, ladder.results)
        if not ladder.results[-1]["passed"]:
            return False
    return True


class Ladder:
    """A recipe with its overrides, the folder of its ladder, and the results so far.

    `options` are those of the command line, for the record only.

    Raises ConfigError for a configuration that cannot train, ManifestError for a manifest that cannot be read.
    """

    def __init__(self, recipe: str, overrides: list[str], out: Path, options: list[str] = ()):
        self.recipe, self.overrides, self.out = recipe, list(overrides), Path(out)
        self.cfg = compose(recipe, self.overrides)
        data = self.cfg.model.train_ds
        if data.get("tarred_audio_filepaths") or data.get("shar_path"):
            raise ConfigError("the ladder takes single utterances out of corpus.train; shards cannot be read so")
        self.rows = usable(read(data.manifest_filepath), data.min_duration, data.max_duration)
        self.dev = paths(self.cfg.model.validation_ds.manifest_filepath)
        self.tokens = bool(self.cfg.model.get("tokenizer"))
        self.about = {
            "recipe": self.cfg.name,
            "corpus": self.cfg.corpus.name,
            "command": shlex.join(["python", "-m", "tools.ladder", *options, "--config-name", recipe, *self.overrides]),
            "unit": "token" if self.tokens else "character",
        }
        self.results: list[dict] = []

    def batch(self, max_steps: int) -> dict:
        """The first rung, and the error on dev of the model that has learned it. Its result, see `_result`."""
        folder = self.out / "batch"
        asked, limits = self._asked("batch", {}, self.rows), {"max_steps": max_steps}
        known = self._known(folder, asked, limits)
        if known:
            return known
        from recipes.metrics import count_errors

        say("one batch")
        cfg = compose(self.recipe, self.overrides)  # of its own: regularisation is taken out in place
        try:
            measured, model = climb_with_model(cfg, max_steps)
        except RungFailed as error:
            verdict = f"rung batch: {error}"
            return self._keep(folder, self._result("batch", asked, limits, passed=False, verdict=verdict, target=0.0))
        learned = measured["batch"]
        with open(folder / "curve.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["step", "seconds", "loss_per_char", "val_wer"])
            rows.writerows([point[key] for key in ("step", "seconds", "loss", "wer")] for point in learned["curve"])
        dev = errors(model, self.dev, folder / "evaluation" / "dev")
        pairs = learned["transcripts"]
        heard = {pair["utterance"] for pair in pairs}
        rows = [row for row in self.rows if (row.get("utterance") or Path(row["audio_filepath"]).stem) in heard]
        words, characters = count_errors([p["reference"] for p in pairs], [p["hypothesis"] for p in pairs])
        result = self._result(
            "batch", asked, limits, rows=rows, passed=True, target=0.0, steps=learned["step"],
            verdict=f"learned by heart at step {learned['step']}, after {learned['seconds'] / 60:.1f} min",
            minutes=learned["seconds"] / 60, dev=dev,
            train={"cer": round(characters.rate, 4), "wer": round(words.rate, 4)},
        )
        return self._keep(folder, result)

    def rung(self, rung: Rung) -> dict:
        """A rung above the batch: trains it, or goes on, evaluates and returns its result.

        Raises TrainingFailed where training ended without having trained, Interrupted where it was asked to end.
        """
        folder = self.out / rung.name
        rows = subset(rung, self.rows)
        sample = rows if len(rows) <= SAMPLE else spread(rows)[:SAMPLE]
        seconds = sum(row["duration"] for row in rows)
        changed = settings(rung, self.cfg, seconds)
        asked, limits = self._asked(rung.name, {"target": rung.target, **changed}, rows), {"minutes": rung.minutes}
        known = self._known(folder, asked, limits)
        if known:
            return known
        # Absolute: these manifests lie elsewhere than the one that they were taken from.
        write_manifest(folder / "sample.json", sample)
        # A folder of its own: exp_manager moves all files of the folder that it goes on in.
        run = ROOT / self.cfg.exp_manager.explicit_log_dir if rung.whole else folder / "run"
        if rung.whole:
            self._same_recipe(run)
        else:
            write_manifest(folder / "train.json", rows)
            changed |= {
                "model.train_ds.manifest_filepath": str(folder / "train.json"),
                "model.validation_ds.manifest_filepath": str(folder / "sample.json"),
                FOLDER: str(run),
            }
        if rung.minutes:
            changed["trainer.max_time"] = duration(rung.minutes)
        say(f"{rung.name}: {len(rows)} utterances, {seconds / 3600:.2f} h, to {'dev' if rung.whole else 'train'} CER "
            f"{rung.target:.0%}" + (f", {rung.minutes:g} min at most" if rung.minutes else ""))
        course = self._train(rung, run, folder, changed)
        on_train, on_dev = self._evaluate(rung, run, folder, diverged=course.status == DIVERGED)
        cer = [float("nan") if part is None else part["cer"] for part in (on_train, on_dev)]
        at = course.reached(rung.target)
        # Either: the last steps of a run that ends by its clock are not validated, the evaluation sees them.
        measured = cer[1] if rung.whole else cer[0]
        good = course.status == 0 and (at is not None or measured <= rung.target)
        verdict = passed(rung, course, *cer) if good else failed(rung, course, *cer, unit=f"a {self.about['unit']}")
        step, seconds = at or (course.steps, course.seconds)
        result = self._result(
            rung.name, asked, limits, rows=rows, passed=good, target=rung.target, train=on_train, dev=on_dev,
            verdict=verdict, steps=step, minutes=seconds / 60, trained_steps=course.steps,
            trained_minutes=round(course.seconds / 60, 2),
        )
        return self._keep(folder, result)

    def _train(self, rung: Rung, run: Path, folder: Path, changed: dict) -> Course:
        """Trains in `run`, or goes on there; how it went over all sittings. Raises TrainingFailed, Interrupted."""
        course = Course.read(run / "curve.csv")
        if rung.whole or course.reached(rung.target) is None:  # else it was cut off after training, before the result
            log = folder / "train.log"
            status, last = train(self.recipe, override_lines(self.overrides, changed), log)
            if status not in (0, DIVERGED):
                reason = last if status == CONFIG else f"training ended with status {status}; read {log}"
                raise TrainingFailed(f"rung {rung.name}: {reason}")
            course = Course.read(run / "curve.csv")
            course.status, course.last_line = status, last
        if (run / "curve.csv").is_file():
            shutil.copyfile(run / "curve.csv", folder / "curve.csv")
        return course

    def _evaluate(self, rung: Rung, run: Path, folder: Path, diverged: bool) -> tuple[dict | None, dict | None]:
        """Errors on the sample and on dev: of the weights at the target; for the whole recipe of the best on dev.

        Both are None where training diverged before there was a checkpoint.
        """
        from recipes.average import best_checkpoints

        last = sorted(run.glob("checkpoints/*-last.ckpt"), key=lambda path: path.stat().st_mtime)
        if not last:
            if diverged:
                return None, None
            raise TrainingFailed(f"rung {rung.name}: {run}/checkpoints has no checkpoint; read {folder}/train.log")
        from recipes.decode import load_model

        checkpoint = best_checkpoints(run)[0] if rung.whole else last[-1]
        model = load_model(checkpoint, "cpu" if self.cfg.trainer.accelerator == "cpu" else "auto")
        return (errors(model, [folder / "sample.json"], folder / "evaluation" / "sample"),
                errors(model, self.dev, folder / "evaluation" / "dev"))

    def _result(self, name: str, asked: dict, limits: dict, *, passed: bool, verdict: str, target: float,
                rows: list[dict] = (), steps: int | None = None, minutes: float | None = None,
                train: dict | None = None, dev: dict | None = None, **more) -> dict:
        """What rung.json holds.

        `steps` and `minutes` are those to the target, and of the whole run where it was not reached; `train` and `dev`
        have `cer` and `wer`, the first on what is trained on; `verdict` is one message.
        """
        return {
            "rung": name, "passed": passed, "verdict": verdict, "target": target, "utterances": len(rows),
            "speakers": len({row.get("speaker", "") for row in rows}),
            "hours": round(sum(row["duration"] for row in rows) / 3600, 4), "steps": steps,
            "minutes": None if minutes is None else round(minutes, 2), "train": train, "dev": dev, **more,
            "limits": limits, "asked": asked,
        }

    def _asked(self, name: str, changed: dict, rows: list[dict]) -> dict:
        """What decides a rung's result, comparable between calls: no folder, no path of its own manifests."""
        dev = [row for path in self.dev for row in read(str(path))]
        return {
            "rung": name,
            "recipe": self.recipe,
            "overrides": sorted(line for line in self.overrides if key_of(line) != FOLDER),
            "changed": {key: quote(value) for key, value in changed.items()},
            "train": fingerprint(rows),
            "dev": fingerprint(dev),
        }

    def _known(self, folder: Path, asked: dict, limits: dict) -> dict | None:
        """The result of a complete rung, or None where it is to be climbed; makes its folder.

        A rung that failed within a smaller limit of time goes on. Raises ConfigError for a folder of another command.
        """
        folder.mkdir(parents=True, exist_ok=True)
        command = folder / "command.json"
        if command.is_file():
            earlier = json.loads(command.read_text())
            other = next((key for key in asked if earlier.get(key) != asked[key]), None)
            if other:
                raise ConfigError(
                    f"{folder} holds this rung of another command ({other}: not {show(asked[other], 200)} but "
                    f"{show(earlier.get(other), 200)}): remove that folder, or name another with --out"
                )
        else:
            write_atomic(command, (json.dumps(asked, indent=1) + "\n").encode())
        done = folder / "rung.json"
        if not done.is_file():
            return None
        known = json.loads(done.read_text())
        if not known["passed"] and known["limits"] != limits:
            return None
        say(f"{asked['rung']}: complete, not run again")
        return known

    def _keep(self, folder: Path, result: dict) -> dict:
        write_atomic(folder / "rung.json", (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode())
        return result

    def _same_recipe(self, run: Path) -> None:
        """Raises ConfigError where `run` holds a training of another model, optimizer or corpus than is asked for."""
        from omegaconf import OmegaConf

        from recipes.config import COMPUTED

        if not (run / "config.yaml").is_file():
            return
        there, here = OmegaConf.load(run / "config.yaml"), self.cfg
        for section in ("model", "training"):
            one = OmegaConf.to_container(there[section], resolve=True)
            other = OmegaConf.to_container(here[section], resolve=True)
            for key in sorted(flat(one, section).keys() | flat(other, section).keys()):
                values = flat(one, section).get(key), flat(other, section).get(key)
                if key not in COMPUTED and values[0] != values[1]:
                    raise ConfigError(
                        f"{run} holds a run with {key}={values[0]}, and {values[1]} is asked for: give this ladder a "
                        f"folder of its own ({FOLDER}=...)"
                    )


def say(text: str) -> None:
    print(f"== ladder, {text}", flush=True)


def paths(value) -> list[Path]:
    """A manifest or several, as a configuration names them, as absolute paths (relative ones are from the root)."""
    return [(ROOT / path).resolve() for path in ([value] if isinstance(value, str) else value)]


def read(value) -> list[dict]:
    """Rows of a manifest or several with absolute audio paths. Raises ManifestError."""
    return [
        {**row, "audio_filepath": row["audio_filepath"] if "tar_offset" in row else resolve_audio(row, path)}
        for path in paths(value) for row in read_manifest(path)
    ]


def fingerprint(rows: list[dict]) -> str:
    """Of the utterances' ids, texts and durations; where their audio lies does not count."""
    told = json.dumps([[identity(row), row["text"], row["duration"]] for row in rows], ensure_ascii=False)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def flat(tree, prefix: str) -> dict:
    """Leaves of nested dicts by their dotted key."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {key: value for name, part in tree.items() for key, value in flat(part, f"{prefix}.{name}").items()}


def errors(model, manifests: list[Path], output: Path) -> dict:
    """{cer, wer} of a model on manifests, greedy; predictions and metrics are kept in `output`."""
    from recipes.evaluate import evaluate_model

    overall = evaluate_model(model, manifests, output=output, progress=False)["overall"]
    return {"cer": round(overall["cer"], 4), "wer": round(overall["wer"], 4)}
