"""What is examined: configuration, model, manifests, run folder, each opened once and only when it is needed.

Errors in opening become findings in `Subject.findings`, never exceptions. This module imports no torch: the live part
of a model is in `probe.py`.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig

from manifests.schema import LABELS, Line, ManifestError, Problem, resolve_audio, scan_manifest
from tools.doctor.configs import DATA_SECTIONS, ConfigUnreadable, Settings, load_config, no_file
from tools.doctor.finding import Finding
from tools.doctor.loading import option
from tools.doctor.sources import Source, adapted

ROLES = ("train", "validation", "test")
MODEL_SUFFIXES = (".nemo", ".ckpt", ".pt")


class Subject:
    """What a check is handed.

    Attributes:
        settings: configs.Settings, the configuration in one shape, or None.
        manifests: role -> list of paths (str).
        run: the run's folder (Path) or None.
        seed: for whatever a check draws at random.
        skipped: path of a manifest -> rows that lhotse's loader leaves out (`_skipme`), and so does this.
        findings: what is wrong with the inputs themselves.
    """

    seed = 20

    def __init__(self, config=None, model=None, manifests=None, run=None, device=None, overrides=(),
                 seconds: float = math.inf):
        self.given_config, self.given_model, self.given_manifests = config, model, manifests
        self.overrides, self.device_wanted = overrides, device
        self.seconds, self._begin = seconds, (time.monotonic(), time.thread_time())
        self._granted = 0.0  # seconds, because opening a model took more than its share
        self.run = None if run is None else Path(run)
        self.settings: Settings | None = None
        self.manifests: dict[str, list[str]] = {}
        self.skipped: dict[str, int] = {}
        self.findings: list[Finding] = []
        self._probe = None
        self._model_failed = False

    # ---- opening -------------------------------------------------------------------------------------------

    def open(self, families: list[str] | None = None) -> None:
        """Reads the configuration, finds the manifests, and opens the model where a family needs it."""
        if self.run is not None and (wrong := self._no_run()):
            self._unreadable(wrong, str(self.run), ["give the folder with config.yaml and curve.csv"])
            self.run = None
        self._open_config()
        self._open_manifests()
        needs_model = families is None or not set(families) <= LIGHT_FAMILIES
        needs_model = needs_model or self.given_config is None and bool(set(families) & OF_CONFIGS)
        if needs_model and self.wants_model:
            self._open_model()
        # Where importing and opening has taken more than half of the budget, half is left for what was asked.
        self._granted = max(0.5 * self.seconds - self.seconds_left(), 0.0)

    def _no_run(self) -> str | None:
        """Why the run's folder cannot be looked into, as a sentence."""
        try:
            os.listdir(self.run)
            os.stat(self.run / ".")
        except NotADirectoryError:
            return f"{self.run} is a file, not the folder of a run."
        except FileNotFoundError:
            return f"There is no folder of a run at {self.run}."
        except OSError as error:
            return f"{self.run} cannot be read: {error.strerror or error}."
        return None

    @property
    def wants_model(self) -> bool:
        """Whether there is a model to open: one given, or a configuration that says how to build it."""
        if self.given_model is not None:
            return True
        settings = self.settings
        return self.given_config is not None and settings is not None and (settings.builds_model or settings.fine_tunes)

    def has(self, need: str) -> bool:
        """Whether the subject has one of registry.NEEDS."""
        return {
            "manifests": any(self.manifests.values()),
            "config": self.settings is not None,
            "model": self._probe is not None,
            "run": self.run is not None,
        }[need]

    def _open_config(self) -> None:
        given = self.given_config
        if given is None and self.run is not None:
            found = [self.run / name for name in ("config.yaml", "hparams.yaml") if os.path.isfile(self.run / name)]
            given = found[0] if found else None
        if given is not None:
            try:
                self.settings = load_config(given, self.overrides)
                return
            except ConfigUnreadable as error:
                # Of a run the rest can be read all the same.
                weight = "prevents" if self.given_config is not None else "warning"
                self.findings.append(replace(error.finding, weight=weight))
        elif self.overrides:
            self._unreadable(f"There is no configuration that {' '.join(self.overrides)} could change.", "overrides",
                             ["give --config-name or --config with them"])
        if self.given_model is not None and not isinstance(self.given_model, (str, Path)):
            self.settings = Settings.of_live(self.given_model)

    def _open_manifests(self) -> None:
        self.__dict__.pop("_sources", None)
        given = self.given_manifests
        if isinstance(given, (str, Path)):
            given = {"train": given}
        # A restored model or an old run names manifests of its own machine and time: those still there are used.
        remembered = given is None and self.given_config is None
        if given is None:
            given = self.settings.manifests if self.settings is not None else {}
        for role, paths in given.items():
            role = {"dev": "validation", "val": "validation", "valid": "validation"}.get(role, role)
            paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
            kept = self.manifests.setdefault(role, [])
            for path in (part for path in paths for part in expanded(str(path))):
                absent = no_file(path, "manifest")
                if absent is None:
                    kept.append(path)
                elif not remembered:
                    self._missing_manifest(role, path, absent)

    def _missing_manifest(self, role: str, path: str, absent: str) -> None:
        self.findings.append(
            Finding(
                "data-manifest-broken",
                "prevents" if role == "train" or self.given_manifests is not None else "warning",
                f"{absent.removesuffix('.')} ({role}).",
                "The path is wrong, or the manifest has not been made yet.",
                {"path": path, "role": role},
                ["give the path of an existing manifest, or make it: ./run.sh --stop-stage 1"],
                1.0,
                where=path,
                unreadable=True,
            )
        )

    def _open_model(self) -> None:
        from tools.doctor.opening import ModelUnreadable, open_model

        try:
            self._probe = open_model(self)
            if self.settings is None:  # a .nemo brings its own
                self.settings = Settings.of_live(self._probe.model)
                if not any(self.manifests.values()):
                    self._open_manifests()
        except ModelUnreadable as error:
            self._model_failed = True
            self.findings.append(error.finding)

    def open_model_of_run(self) -> str | None:
        """Builds the model of a run's configuration anew; says why where that cannot be done, which is no fault."""
        if self.run is None or self.settings is None or not self.settings.builds_model:
            return "no configuration in its folder says how it is built"
        return self._try_to_open()

    def open_weights_of_run(self) -> str | None:
        """Opens the newest checkpoint of a run; says why where that cannot be done, which is no fault."""
        from tools.doctor import checkpoints

        found = checkpoints.find(self.run)
        if not found:
            return "no checkpoint is there"
        self.given_model = found[-1]
        try:
            return self._try_to_open()
        finally:
            self.given_model = None

    def _try_to_open(self) -> str | None:
        """Opens the model of a run; why not, where its code or its tokenizer are not here any more."""
        from tools.doctor.opening import ModelUnreadable, open_model

        try:
            self._probe = open_model(self)
        except ModelUnreadable as error:
            return error.finding.symptom
        return None

    def _unreadable(self, symptom: str, where: str, fix: list[str]) -> None:
        self.findings.append(
            Finding("input-unreadable", "prevents", symptom, "It is not there, or not of the kind that was expected.",
                    {}, fix, 1.0, where=where, unreadable=True)
        )

    # ---- the model -----------------------------------------------------------------------------------------

    @property
    def probe(self):
        """probe.Probe around the live model; only for checks that need "model"."""
        return self._probe

    @property
    def model(self):
        """The live NeMo model."""
        return self._probe.model

    # ---- what several families ask -------------------------------------------------------------------------

    @cached_property
    def labels(self) -> list[str] | None:
        """Characters the model can write, None for sub-word tokens or where nothing says."""
        if self._probe is not None:
            return self._probe.labels
        if self.settings is not None and (self.settings.labels or self.settings.tokenizer_dir):
            return self.settings.labels
        return list(LABELS) if self.settings is None else None

    @property
    def labels_assumed(self) -> bool:
        """Whether `labels` are those of our recipes only because nothing says what the model's are."""
        return self._probe is None and self.settings is None

    @property
    def sample_rate(self) -> int:
        """Of the model, in Hz; 16000 where nothing says."""
        if self.settings is not None and self.settings.sample_rate:
            return self.settings.sample_rate
        return 16000

    @cached_property
    def rows(self) -> dict[str, list[dict[str, Any]]]:
        """Role -> the usable rows of its manifests without nulls, audio paths resolved, `_at` = "file:line"."""
        found: dict[str, list[dict[str, Any]]] = {}
        for role, paths in self.manifests.items():
            rows = found.setdefault(role, [])
            channel = self._channel(role)
            for path in paths:
                try:
                    for line in self.scan(path):
                        if line.row is not None and not any(map(partial(spoils, line.row), line.problems)):
                            row = {name: value for name, value in line.row.items() if value is not None}
                            row["audio_filepath"] = resolve_audio(row, path)
                            row["_at"] = f"{os.path.normpath(path)}:{line.number}"  # as the validator names it
                            if channel is not None:  # lhotse takes the name of a field that holds it, too
                                row["_channel"] = row.get(channel, channel) if isinstance(channel, str) else channel
                            rows.append(row)
                except ManifestError:
                    continue  # the data family says so
        return found

    def scan(self, path: str | os.PathLike, on_blank: Callable[[int], None] | None = None) -> Iterator[Line]:
        """The lines of one of the manifests as the loader of its data section reads them; else as scan_manifest."""
        name = os.path.normpath(path)
        source = self._sources.get(name, Source(os.fspath(path)))
        self.skipped[name] = 0
        for line in scan_manifest(path, on_blank=on_blank):
            if source.reader == "lhotse" and line.row is not None and line.row.get("_skipme"):
                self.skipped[name] += 1
            else:
                yield adapted(line, source)

    @cached_property
    def _sources(self) -> dict[str, Source]:
        """Path of a manifest -> how its lines are read."""
        found = {}
        for role, paths in self.manifests.items():
            usual = self.settings.options(role) if self.settings is not None else Source()
            found |= {os.path.normpath(path): usual._replace(path=path) for path in paths}
        for role in self.manifests.keys() & DATA_SECTIONS.keys() if self.settings is not None else ():
            for source in self.settings.sources(role)[0]:
                parts = {os.path.normpath(part): source._replace(path=part) for part in expanded(source.path)}
                found |= {path: part for path, part in parts.items() if path in found}
        return found

    def _channel(self, role: str) -> Any:
        """What the data section of a role says of channels, where its loader reads it."""
        chosen = option(self.settings, role, "channel_selector")
        return list(chosen) if isinstance(chosen, ListConfig) else chosen

    def not_read(self) -> list[str]:
        """What the configuration names as data to train with, and nothing here reads; a line each."""
        section = self.settings.get("model.train_ds") if self.settings is not None else None
        if self.given_manifests is not None or not isinstance(section, DictConfig):
            return []
        named, other = self.settings.sources("train")
        told = any(finding.where in {part for source in named for part in expanded(source.path)}
                   for finding in self.findings)
        if self.manifests.get("train") or told:
            return [f"data, audio, pairs: a part of the train data is no manifest ({', '.join(other[:5])})"] * bool(other)
        what = (f"names manifests that are not here ({named[0].path})" if named else
                "names no manifest that can be read (" + (", ".join(other[:5]) or "input_cfg/shar/cuts") + ")")
        return [f"data, audio, pairs: the train section {what}: --train"]

    def seconds_left(self) -> float:
        """Of the budget. On a machine that is shared, waiting for one's turn counts by a third only."""
        wall, own = time.monotonic() - self._begin[0], time.thread_time() - self._begin[1]
        return self.seconds + self._granted - max(own, wall / 3)


def spoils(row: dict[str, Any], problem: Problem) -> bool:
    """Whether a row cannot be used for this problem: not for one in a field that NeMo never reads, nor for a null."""
    if problem.field == "offset":
        return row["offset"] is not None
    return problem.field in ("", "audio_filepath", "duration", "text")


def expanded(path: str) -> list[str]:
    """The paths that NeMo's patterns of shards stand for: `manifest__OP_0..3_CL_.json`, `manifest_{0..3}.json`."""
    found = re.search(r"(_OP_|[{(\[<])(\d+)\.\.(\d+)(_CL_|[})\]>])", path)
    if found is None or os.path.isfile(path):
        return [path]
    first, last = int(found[2]), int(found[3])
    numbers = range(first, min(last, first + 99_999) + 1)
    return [part for n in numbers for part in expanded(f"{path[: found.start()]}{n}{path[found.end():]}")]


OF_CONFIGS = {"schedule", "limits", "tokenizer"}  # families that a model's own configuration is enough for
LIGHT_FAMILIES = {"data", "audio", "pairs", "tokenizer", "schedule", "limits", "order", "run", "metrics"}
