"""Trains one version of a history with the doctor before, during and after, and keeps what was seen."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from recipes import allow_targets
from recipes.config import ConfigError
from recipes.quiet import quiet_nemo
from tools.histories.history import History, configuration

EXAMPLES = 3
PREFIX = "tools.histories."  # NeMo builds the encoders of this package by name


def build(history: History, version: str, cfg, trainer=None):
    """The model of a version, `cfg` filled in."""
    from recipes.train import build_model

    allow_targets(PREFIX)
    if version != "fixed" and history.model:
        from hydra.utils import get_class

        return get_class(history.model)(cfg=cfg.model, trainer=trainer)
    return build_model(cfg, trainer)


def train(history: History, version: str, manifests, folder: Path, steps: int | None = None, seconds: float = 40.0):
    """Trains `version` and returns what was seen, as JSON holds it.

    `manifests` are the paths of its train and dev; `seconds` is the doctor's budget before and after, where it
    examines the broken version; the others it only watches. Leaves config.yaml, curve.csv, doctor/ and seen.json in
    `folder`. What it returns is that of seen.json: steps, parameters, error, anatomy (of the first step
    that was not finite), examples, letters, and the doctor's findings by stage.
    """
    from lightning.pytorch import Trainer, seed_everything
    from omegaconf import OmegaConf, open_dict

    from recipes.monitor import Progress
    from recipes.train import fill_in
    from tools.doctor import Doctor, examine
    from tools.histories.unprotected import StopAfterNaN

    quiet_nemo()
    allow_targets(PREFIX)
    folder.mkdir(parents=True, exist_ok=True)
    cfg = configuration(history, version, *manifests, folder, steps)
    with open_dict(cfg):
        given_schedule = {key: cfg.model.optim.sched[key] for key in cfg.model.optim.sched
                          if not OmegaConf.is_missing(cfg.model.optim.sched, key)}
        fill_in(cfg)
        # train.py counts the warm-up in shares of the run; a history may have one in steps, as users do
        cfg.model.optim.sched.update(given_schedule)
        if history.on_one_batch(version):  # all of it in each step
            cfg.model.train_ds.batch_duration = 1000.0
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    given = {"train": [str(manifests[0])], "validation": [str(manifests[1])]}
    findings = {}
    if version == "broken":
        findings["before"] = examine(config=cfg, manifests=given, seconds=seconds)
    seed_everything(cfg.seed, verbose=False)
    doctor = Doctor(folder=folder, probe=False)  # probed before and after; here only what is seen while it trains
    callbacks = [Progress(folder, every_n_steps=cfg.trainer.log_every_n_steps), StopAfterNaN(), doctor]
    trainer = Trainer(**OmegaConf.to_container(cfg.trainer, resolve=True), callbacks=callbacks)
    model = build(history, version, cfg, trainer)
    error = ""
    try:
        trainer.fit(model)
    except Exception as raised:  # the way some of these runs end
        logging.getLogger("recipes").debug("run ended", exc_info=True)
        error = f"{type(raised).__name__}: {' '.join(str(raised).split())[:300]}"
        (folder / "error.txt").write_text(error + "\n")
    findings["during"] = doctor.report()
    if version == "broken":
        findings["after"] = examine(run=folder, seconds=seconds)
    examples = [[text, hypothesis] for _, text, hypothesis in getattr(model, "validation_examples", [])]
    seen = {
        "asked": asked(history, version, manifests, steps),
        "history": history.name,
        "version": version,
        "steps": trainer.global_step,
        "parameters": sum(p.numel() for p in model.parameters()),
        "error": error,
        "anatomy": getattr(model, "anatomy", {}),
        "examples": examples[:: max(len(examples) // EXAMPLES, 1)][:EXAMPLES],
        "letters": letters([hypothesis for _, hypothesis in examples]),
        "doctor": {stage: _told(report) for stage, report in findings.items()},
    }
    (folder / "seen.json").write_text(json.dumps(_plain(seen), indent=1) + "\n")
    return json.loads((folder / "seen.json").read_text())


def ask_again(manifests, folder: Path, seen: dict, seconds: float = 40.0) -> dict:
    """`seen` of a broken run that is there, with what the doctor says of it now, before and after it.

    What it said during the run stays, as nothing is trained. Raises ConfigError where the run's config.yaml is gone.
    """
    from omegaconf import OmegaConf

    from tools.doctor import examine

    path = Path(folder) / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; leave --again out to train it anew")
    quiet_nemo()
    allow_targets(PREFIX)
    given = {"train": [str(manifests[0])], "validation": [str(manifests[1])]}
    now = {"before": examine(config=OmegaConf.load(path), manifests=given, seconds=seconds),
           "after": examine(run=folder, seconds=seconds)}
    told = {stage: _told(now[stage]) if stage in now else earlier for stage, earlier in seen["doctor"].items()}
    seen = _plain({**seen, "doctor": told})
    (Path(folder) / "seen.json").write_text(json.dumps(seen, indent=1) + "\n")
    return seen


def asked(history: History, version: str, manifests, steps: int | None) -> dict:
    """What a run depends on, to know whether it is there already."""
    return {
        "lines": history.lines(version), "model": history.model, "steps": steps or history.steps,
        "data": [hashlib.sha1(Path(path).read_bytes()).hexdigest() for path in manifests],
    }


def known(history: History, version: str, manifests, folder: Path, steps: int | None) -> dict | None:
    """What `train` returned for the same before, or None."""
    path = Path(folder) / "seen.json"
    if not path.is_file():
        return None
    seen = json.loads(path.read_text())
    return seen if seen.get("asked") == asked(history, version, manifests, steps) else None


def letters(texts: list[str]) -> dict[str, int]:
    """How often each character is predicted, the most frequent first."""
    from collections import Counter

    return dict(Counter("".join(texts)).most_common())


def _told(report) -> dict:
    """Verdict and findings of a report, notes left out."""
    findings = [finding for finding in report.findings if finding.weight != "note"]
    return {
        "verdict": report.verdict,
        "findings": [
            {"id": f.id, "weight": f.weight, "confidence": f.confidence, "symptom": f.symptom, "fix": f.fix[:1]}
            for f in findings
        ],
        "not_examined": len(report.not_examined),
    }


def _plain(value):
    from tools.doctor.finding import plain

    return plain(value)
