"""Runs the checks over a subject and makes one report of what they find."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from typing import Any

from tools.doctor.causes import name_causes
from tools.doctor.finding import Report
from tools.doctor.registry import NEEDS, NotExamined, checks
from tools.doctor.subject import Subject

log = logging.getLogger("doctor")


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
    available = [need for need in NEEDS if subject.has(need)]
    named: list[str] = []
    for check in checks(available, families):
        label = f"{check.family}: {check.title}"
        missing = [need for need in check.needs if need not in available]
        if missing:
            report.not_examined.append(f"{label}: needs {', '.join(missing)}")
            continue
        if subject.seconds_left() <= 0:
            report.not_examined.append(f"{label}: the {seconds:g} s given were over")
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
    report.findings = name_causes([*subject.findings, *report.findings])
    report.sort()
    # A fault is ruled out where every check that could name it has run and none did.
    seen = {finding.id for finding in report.findings}
    report.ruled_out = sorted(set(named) - seen)
    return report


def first_line(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split())[:300]
