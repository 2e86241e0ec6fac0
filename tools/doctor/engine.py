"""Runs the checks over a subject and makes one report of what they find."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

from tools.doctor.causes import name_causes
from tools.doctor.finding import Finding, Report
from tools.doctor.opening import NOT_CTC
from tools.doctor.registry import FAMILIES, NEEDS, Check, NotExamined, checks
from tools.doctor.subject import Subject

log = logging.getLogger("doctor")

UNLEARNED = {"run-early", "run-plateau", "run-collapse-blank", "run-collapse-letter", "run-diverged", "run-nan",
             "run-overfitting"}
LAST = "exchange"  # trains; only where nothing was found that prevents learning, or where it is asked for
OF_A_RUN = ("outputs", "features", "lengths", "labels", "loss", "gradients", "weights", "locality", "neighbours",
            "invariance", "depth")


def examine(
    config: Any = None,
    model: Any = None,
    manifests: dict[str, Any] | None = None,
    run: Any = None,
    seconds: float = 60.0,
    device: Any = None,
    *,
    families: Iterable[str] | None = None,
    overrides: Iterable[str] = (),
) -> Report:
    """Everything that the doctor can say about what it is given, any part of which may be left out.

    Args:
        config: a recipe's name, the path of a YAML, a dict or DictConfig: a whole recipe (`model:`, `trainer:`) or its
            model section. The model is built from it where none is given, the manifests are those it names.
        model: a live NeMo CTC model, or the path of a `.nemo` or a checkpoint. It is left as it was found.
        manifests: role -> path or paths; roles are "train", "validation", "test".
        run: the folder of a finished or dead run.
        seconds: budget; checks that did not get their turn are listed in `not_examined`.
        device: where the model is probed; None for a GPU where there is one, for a live model where it is.
        families: names of registry.FAMILIES to run; None for all.
        overrides: Hydra overrides, for a recipe.

    Returns:
        Report: what is wrong with the input itself, such as a file that is not there, is a finding too; nothing is
        raised for it.
    """
    subject = Subject(
        config=config, model=model, manifests=manifests, run=run, device=device, overrides=tuple(overrides),
        seconds=seconds,
    )
    report = Report()
    families = None if families is None else list(families)
    subject.open(families)
    # A transducer or hybrid is no fault; what else was given is examined all the same.
    passed = [finding for finding in subject.findings if finding.id == NOT_CTC]
    subject.findings = [finding for finding in subject.findings if finding not in passed]
    report.not_examined += [f"the model: {finding.symptom}" for finding in passed]
    available = [need for need in NEEDS if subject.has(need)]
    if all(given is None for given in (config, model, manifests, run)) and not overrides:
        report.not_examined.append("nothing was given: a configuration, a model, manifests or the folder of a run")
    elif not subject.findings and not passed:
        report.not_examined += [f"{family}: needs {' or '.join(FAMILIES[family][1])}" for family in families or ()
                                if not set(FAMILIES[family][1]) & set(available)]
    if config is not None and subject.settings is not None and not subject.wants_model and families is None:
        report.not_examined.append("the model: the configuration has no sections encoder and decoder to build it from")
    if families is None or {"data", "audio", "pairs"} & set(families):
        report.not_examined += subject.not_read()
    first = [family for family in FAMILIES if family != LAST] if families is None else families
    named = run_checks(subject, checks(available, first), available, report)
    of_run = families is None and model is None and config is None and subject.run is not None
    if of_run and not unlearned(report, told_by_dev=False) and subject.has("manifests") and subject.seconds_left() > 20:
        # One that has learned is asked whether it hears what the manifests say.
        if subject.open_weights_of_run() is None:
            named += run_checks(subject, checks(["model"], ["heard"]), [*available, "model"], report)
    elif of_run and unlearned(report) and subject.seconds_left() > 20:
        # Why a run has not learned is often in its model: it is built anew and probed.
        if (reason := subject.open_model_of_run()) is None:
            named += run_checks(subject, checks(["model"], OF_A_RUN), [*available, "model"], report)
        else:
            report.not_examined.append(f"the model of this run: {reason}")
    if families is None and subject.has("model") and (subject.run is None or unlearned(report)) and not explained(subject, report):
        named += run_checks(subject, checks(["model"], [LAST]), [*available, "model"], report)
    report.findings = name_causes([*subject.findings, *report.findings])
    report.findings += refused(subject, report, families)
    report.sort()
    # A fault is ruled out where every check that could name it has run and none did.
    seen = {finding.id for finding in report.findings}
    report.ruled_out = sorted(set(named) - seen)
    return report


def run_checks(subject: Subject, chosen: list[Check], available: list[str], report: Report) -> list[str]:
    """Runs the checks and puts what they say into the report; returns the faults that those that ran whole can name."""
    named: list[str] = []
    for check in chosen:
        label = f"{check.family}: {check.title}"
        missing = [need for need in check.needs if need not in available]
        if missing:
            report.not_examined.append(f"{label}: needs {', '.join(missing)}")
            continue
        if subject.seconds_left() <= 0:
            report.not_examined.append(f"{label}: the {subject.seconds:g} s given were over")
            continue
        whole, found, begin = False, [], time.thread_time()
        try:
            for finding in check.function(subject) or ():
                found.append(finding)
            whole = True
        except NotExamined as reason:
            report.not_examined.append(f"{label}: {reason}")
        except Exception as error:  # one broken check must not hide what the others found
            log.debug("check %s", check.name, exc_info=True)
            report.not_examined.append(f"{label}: {type(error).__name__}: {first_line(error)}")
        log.debug("%s took %.2f s", label, time.thread_time() - begin)
        report.findings.extend(found)
        if whole:
            report.examined.append(label)
            named += check.faults
    return named


def refused(subject: Subject, report: Report, families: list[str] | None) -> list[Finding]:
    """A finding where our training would refuse the configuration, and no check has said why.

    What a check has only warned of becomes grave where its key is what training stops at.
    """
    why = subject.settings.refused if subject.settings is not None else ""
    asked = families is None or {"limits", "schedule"} & set(families)
    if not why or not asked or report.of_weight("prevents") or "manifest_filepath" in why:  # others may be given
        return []
    key = why.partition("=")[0]
    warned = next((f for f in report.of_weight("warning") if any(change.startswith(key) for change in f.fix)), None)
    if warned is not None:
        warned.weight, warned.evidence = "prevents", {**warned.evidence, "training refuses it": why}
        return []
    return [Finding("model-does-not-build", "prevents", f"Training refuses this configuration: {why}.",
                    "A value is missing, or two values cannot be together.", {}, ["mend the key that it names"], 1.0,
                    where=subject.settings.name)]


def explained(subject: Subject, report: Report) -> bool:
    """Whether something is known already that prevents learning, beside that a run has not learned."""
    return bool(subject.findings or {finding.id for finding in report.of_weight("prevents")} - UNLEARNED)


def unlearned(report: Report, told_by_dev: bool = True) -> bool:
    """Whether the report is of a run that has learned nothing, or has lost what it had.

    told_by_dev: whether one counts that has learned its train set and nothing of validation.
    """
    ids = UNLEARNED if told_by_dev else UNLEARNED - {"run-overfitting"}
    return any(finding.id in ids for finding in report.findings)


def first_line(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())[:300]
