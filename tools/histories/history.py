"""A history as it is written down, its configuration, and the utterances that it is shown. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from manifests.schema import read_manifest, resolve_audio, write_manifest
from recipes.config import ConfigError, compose, recipes, suggest

CASES = Path(__file__).resolve().parent / "cases"
# one_batch is the broken version on eight utterances, where the user saw it learn.
VERSIONS = ("broken", "one_batch", "fixed")
DURATIONS = (3.0, 8.0)  # seconds, shortest and longest
LONGEST_OF_A_BATCH = 4.0  # where it is one batch
UTTERANCES_OF_A_BATCH, DEV_UTTERANCES = 8, 12
STEPS_ON_ONE_BATCH = 100


@dataclass(frozen=True)
class History:
    """One history.

    name: of the file in cases/.
    reported: which of the three reports it explains: a (DeepSpeech, NaN), b (DeepSpeech2, one letter), c (Conformer).
    recipe: of conf/.
    title, saw, cause, fix: in words.
    steps: after which the fault can be seen, on batches of `training.global_batch_seconds`.
    causes: the doctor's names for the cause; the first finding should be one of them.
    overrides, broken, fixed: of the recipe, for both versions and for each.
    model: class that trains the broken version where it is not the recipe's own, whose loop is protected.
    one_batch: whether it is trained on one batch, as the user did to find the fault; else on an hour of speech.
    learns_one_batch: whether the user saw the broken version learn one batch, which is then shown.
    upper_case: whether the broken version's transcripts are in capitals, as LibriSpeech has them.
    durations: of the utterances in seconds, shortest and longest.
    """

    name: str
    reported: str
    recipe: str
    title: str
    saw: str
    cause: str
    fix: str
    steps: int
    causes: tuple[str, ...]
    broken: tuple[str, ...]
    fixed: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    model: str = ""
    one_batch: bool = False
    learns_one_batch: bool = False
    upper_case: bool = False
    durations: tuple[float, float] = DURATIONS

    def lines(self, version: str) -> list[str]:
        """The overrides of one version."""
        return [*self.overrides, *(self.fixed if version == "fixed" else self.broken)]

    def on_one_batch(self, version: str) -> bool:
        return self.one_batch or version == "one_batch"

    def versions(self, fixed: bool) -> list[str]:
        """What is trained, in this order."""
        wanted = {"broken": True, "one_batch": self.learns_one_batch, "fixed": fixed}
        return [version for version in VERSIONS if wanted[version]]


def names() -> list[str]:
    """Of all histories, in order of the reports."""
    return sorted(path.stem for path in CASES.glob("*.yaml"))


def load(name: str) -> History:
    """Raises ConfigError, in one line, where there is no such history or its file is not of this shape."""
    from omegaconf import OmegaConf

    if name not in names():
        raise ConfigError(f"no history {name!r}{suggest(name, names())}")
    path = CASES / f"{name}.yaml"
    values = OmegaConf.to_container(OmegaConf.load(path))
    known = {f.name for f in fields(History)} - {"name"}
    if unknown := sorted(set(values) - known):
        raise ConfigError(f"{path.name}: unknown key {unknown[0]}{suggest(unknown[0], known)}")
    for key, value in values.items():
        if isinstance(value, list):
            values[key] = tuple(value)
        elif isinstance(value, str):
            values[key] = " ".join(value.split())
    try:
        history = History(name=name, **values)
    except TypeError as error:
        raise ConfigError(f"{path.name}: {error}") from None
    if history.recipe not in recipes():
        raise ConfigError(f"{path.name}: recipe={history.recipe}{suggest(history.recipe, recipes())}")
    return history


def configuration(history: History, version: str, train: Path, dev: Path, folder: Path, steps: int | None = None):
    """The composed configuration of a version; its run's folder is `folder`. Raises ConfigError."""
    usual = min(history.steps, STEPS_ON_ONE_BATCH) if version == "one_batch" else history.steps
    return compose(history.recipe, [
        "corpus=librispeech_8h", "trainer=cpu", "trainer.precision=32", "logger=csv",
        "corpus.bucket_duration_bins=[4.0,5.0,6.0,7.0]", f"corpus.train={_quoted(train)}",
        f"corpus.validation={_quoted(dev)}", f"exp_manager.explicit_log_dir={_quoted(folder)}",
        f"trainer.max_steps={steps or usual}", "training.validations=1", "training.global_batch_seconds=16",
        "model.train_ds.num_workers=0", "trainer.log_every_n_steps=5",
        *(["model.train_ds.use_bucketing=false"] if history.on_one_batch(version) else []),
        *history.lines(version),
    ])


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("'", "\\'") + "'"


def choose(rows: list[dict], hours: float, durations: tuple[float, float] = DURATIONS) -> list[dict]:
    """Utterances of `durations` (s) spread over the manifest, `hours` of them or all that there are."""
    short = [row for row in rows if durations[0] <= row["duration"] <= durations[1]]
    total = sum(row["duration"] for row in short) / 3600
    if total <= hours:
        return short
    every, kept, due = hours / total, [], 0.0
    for row in short:
        due += every
        if due >= 1:
            kept.append(row)
            due -= 1
    return kept


def write_manifests(history: History, version: str, data: Path, dev: Path, folder: Path, hours: float):
    """The version's own train and dev manifests in `folder`; returns their paths.

    Raises ManifestError for a manifest that cannot be read, ConfigError where it has no utterance of the history's
    durations.
    """
    made = []
    rows = choose(_rows(data), hours, history.durations)
    heard = choose(_rows(dev), 1e9, history.durations)
    if history.on_one_batch(version):
        rows = [row for row in rows if row["duration"] <= LONGEST_OF_A_BATCH] or rows
        rows = heard = rows[:: max(len(rows) // UTTERANCES_OF_A_BATCH, 1)][:UTTERANCES_OF_A_BATCH]
    if not rows or not heard:
        shortest, longest = history.durations
        raise ConfigError(f"{dev if rows else data}: no utterance of {shortest:g} to {longest:g} s")
    heard = heard[:: max(len(heard) // DEV_UTTERANCES, 1)][:DEV_UTTERANCES]
    for name, part in (("train", rows), ("dev", heard)):
        if history.upper_case and version != "fixed":
            part = [{**row, "text": row["text"].upper()} for row in part]
        path = folder / f"{name}.json"
        write_manifest(path, part)
        made.append(path)
    return made


def _rows(path: Path) -> list[dict]:
    return [{**row, "audio_filepath": str(resolve_audio(row, path))} for row in read_manifest(path)]
