"""A run on several devices: one report, by rank 0, with what the other ranks have found."""

from __future__ import annotations

import logging

from tools.doctor.finding import Finding, Report
from tools.doctor.trace import Trace

log = logging.getLogger("doctor")

NOT_PROBED = ("probes of the model: not made at the end of a run on several devices: python -m tools.doctor check on its "
              "configuration makes them")
FROM_ANOTHER = "or"  # in the evidence of a gradient that another device may have spoilt


def together(trainer) -> bool:
    """Whether this run has several ranks that can speak to each other."""
    import torch.distributed as dist

    return trainer.world_size > 1 and dist.is_available() and dist.is_initialized()


def ask(trainer, trace: Trace, findings, cost: float) -> list[dict]:
    """At rank 0 what all ranks have found, its counts added to the trace; [] elsewhere and on one device.

    `findings()` gives this rank's. Each rank must call it, once, at the same place.
    """
    if not together(trainer):
        return []
    try:
        own = facts(trace, findings(), cost)
    except Exception:  # it was switched off early; the others wait for an answer all the same
        own = facts(Trace(), [], cost)
    every = gather(trainer, own)
    if not trainer.is_global_zero:
        return []
    count_together(trace, every, 0)
    return every


def facts(trace: Trace, findings: list[Finding], cost: float) -> dict:
    """What a rank tells the others: plain values, some kilobytes."""
    told = [finding for finding in findings if finding.weight != "note"]
    return {
        "findings": Report(told).to_dict()["findings"],
        "utterances_seen": trace.utterances_seen,
        "infeasible": dict(trace.infeasible),
        "infeasible_seen": trace.infeasible_seen,
        "cost": cost,
        "first": list(trace.first_batch),
    }


def gather(trainer, own: dict) -> list[dict]:
    """The facts of all ranks, in their order, at every rank. Each rank must call it, once, at the same place."""
    import torch.distributed as dist

    every: list = [None] * trainer.world_size
    try:
        dist.all_gather_object(every, own)
    except Exception as error:  # a rank that is gone: the report must not be lost for it
        log.warning("doctor: the other ranks cannot be asked: %s: %s", type(error).__name__, str(error)[:200])
        return [own]
    return every


def count_together(trace: Trace, every: list[dict], rank: int) -> None:
    """Adds what the other ranks have counted to a trace."""
    for other, told in enumerate(every):
        if other == rank:
            continue
        trace.utterances_seen += told["utterances_seen"]
        trace.infeasible_seen += told["infeasible_seen"]
        for name, room in told["infeasible"].items():
            if len(trace.infeasible) < 20:
                trace.infeasible.setdefault(name, tuple(room))


def joined(found: list[Finding], every: list[dict], rank: int) -> list[Finding]:
    """A rank's findings and those of the others. That a summed gradient is not finite yields to what the rank has found
    whose loss was not."""
    found = found + same_batches(every)
    own = [finding for finding in found if FROM_ANOTHER not in finding.evidence]
    more = seen_elsewhere(every, rank, {finding.id for finding in own})
    if any("first at step" in finding.evidence for finding in more):
        return own + more
    ids = {finding.id for finding in found}
    return found + [finding for finding in more if finding.id not in ids]


def same_batches(every: list[dict]) -> list[Finding]:
    """A finding where the first batch of all ranks holds the same texts."""
    first = [sorted(told.get("first", ())) for told in every]
    if len(first) < 2 or len(set(first[0])) < 2 or any(keys != first[0] for keys in first):
        return []
    return [Finding(
        "data-duplicates", "warning",
        f"The first batch of all {len(first)} devices is the same {len(first[0])} utterances.",
        "Nothing gives each device its own share of the data. All compute the same gradient, so that a step is worth no more "
        f"than on one device, and an epoch goes over the data {len(first)} times.",
        {"devices": len(first), "utterances": len(first[0])},
        ["trainer.use_distributed_sampler=true (Lightning's default), for a loader of rows",
         "a loader that gives its own batches: DistributedSampler, or NeMo's with global_rank and world_size"], 0.9,
        where="the training loader")]


def seen_elsewhere(every: list[dict], rank: int, known: set[str]) -> list[Finding]:
    """Findings of other ranks of which this one knows nothing, each once, with the rank in its evidence."""
    found: dict[str, Finding] = {}
    for other, told in enumerate(every):
        if other == rank:
            continue
        for finding in Report.from_dict({"findings": told["findings"], "examined": [], "ruled_out": [],
                                         "not_examined": []}).findings:
            if finding.id not in known and finding.id not in found and FROM_ANOTHER not in finding.evidence:
                finding.evidence = {"seen on device": other, **finding.evidence}
                found[finding.id] = finding
    return list(found.values())
