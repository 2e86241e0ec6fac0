"""What a live trainer, model and optimizer tell at once: plan, folder, idle parameters, schedule, outputs."""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path

from tools.doctor.autopsy import Output
from tools.doctor.finding import Finding, Plot, Report
from tools.doctor.trace import Trace

log = logging.getLogger("doctor")

LARGE = 1e4  # an output beyond this is on its way out; those of models that train stay below
GROWS = 1e3  # times from the first frames to the last


def planned_steps(trainer) -> int | None:
    """Optimizer steps that the run will have; None where it is endless."""
    try:
        steps = trainer.estimated_stepping_batches
    except Exception:  # an endless loader, or one that cannot be asked yet
        steps = trainer.max_steps
    return int(steps) if isinstance(steps, (int, float)) and math.isfinite(steps) and steps > 0 else None


def run_folder(trainer) -> Path | None:
    """Where the run writes: NeMo's experiment folder, the first logger's, the trainer's; None where it writes
    nothing."""
    state = sys.modules.get("nemo.utils.app_state")
    if state is not None and (folder := getattr(state.AppState(), "log_dir", None)):
        return Path(folder)
    if trainer.loggers and (folder := trainer.log_dir):
        return Path(folder)
    return Path(trainer.default_root_dir) if trainer.default_root_dir else None


def optimizer_findings(trainer, model) -> list[Finding]:
    """Parameters that should be trained and are in no optimizer, and those that are frozen."""
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    if not held:
        return []
    wanted = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    missing = [(name, p.numel()) for name, p in wanted if id(p) not in held]
    frozen = [(name, p.numel()) for name, p in model.named_parameters() if not p.requires_grad]
    every = max(sum(p.numel() for p in model.parameters()), 1)
    found = []
    for id_, rows, what, fix in (
        ("not-in-optimizer", missing, "are in no optimizer",
         "build the optimizer from model.parameters(), after the last layer has been made"),
        ("frozen", frozen, "are frozen (requires_grad=False)", "model.unfreeze(), or p.requires_grad_(True)"),
    ):
        if not rows:
            continue
        share = sum(count for _, count in rows) / every
        # Some parts are frozen on purpose: windows, filters, a pretrained encoder.
        heavy = id_ == "not-in-optimizer" and share > 0.01 or share > 0.9
        if share < 1e-4:
            continue
        found.append(Finding(
            id_, "prevents" if heavy else "warning",
            f"{len(rows)} parameter tensors ({share:.0%} of all values) {what}, first {rows[0][0]}.",
            "They keep the values they were made with.",
            {"parameters": [name for name, _ in rows][:12], "share of all values": share}, [fix],
            0.95 if heavy else 0.6,
            where=rows[0][0]))
    return found


def schedule_findings(trainer, trace: Trace) -> tuple[list[Finding], int | None]:
    """(findings, warm-up steps or None) of the live schedulers."""
    found, warmup = [], None
    for config in trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        warmup = getattr(scheduler, "warmup_steps", None) or warmup
        counts_steps = warmup or type(scheduler).__name__ in ("OneCycleLR", "LinearLR", "CyclicLR")
        if config.interval == "epoch" and counts_steps:
            key = trace.key("model.optim.sched")
            found.append(Finding(
                "schedule-per-epoch", "prevents",
                f"{type(scheduler).__name__} counts steps ({warmup or 'its total'}) and is stepped once an epoch.",
                "A warm-up of so many steps then lasts so many epochs.",
                {"scheduler": type(scheduler).__name__, "interval": config.interval, "warm-up": warmup},
                ['return {"scheduler": scheduler, "interval": "step"} from configure_optimizers'], 0.95, where=key))
    if not trainer.lr_scheduler_configs and trainer.optimizers and trace.optimizer.lower() not in ("novograd", "sgd"):
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        if rate > 3e-3:
            found.append(Finding(
                "warmup-missing", "warning",
                f"There is no schedule: {trace.optimizer} takes its first step at {rate:.2g}.",
                "The first gradients of CTC are large and point to blanks; full steps along them saturate the outputs.",
                {"learning rate": rate}, [f"{trace.key('model.optim.sched.name')}=CosineAnnealing with warmup_steps "
                                          "of a tenth of the run"], 0.6, where=trace.key("model.optim.sched")))
    return found, int(warmup) if warmup else None


def scanned(outputs: list[Output], trace: Trace) -> list[Finding]:
    """A finding where a module's output, still finite, is far larger than any that trains."""
    large = [o for o in outputs if o.finite and o.largest > LARGE and "preprocessor" not in o.name and "featurizer" not
        in o.name]
    if not large or trace.bad is not None:
        return []
    first = large[0]
    values = [v for v in (first.growth or ([], []))[1] if math.isfinite(v)]
    times = max(values) / max(values[0], 1e-30) if len(values) > 3 else 0.0
    in_time = times > GROWS
    plots = [Plot("Largest output of each module, in order of execution", "module", "largest absolute value",
                  {"": (list(range(1, len(outputs) + 1)), [o.largest for o in outputs])},
                  f"the first above {LARGE:g} is {first.name}")]
    if first.growth:
        plots.append(Plot(f"Largest output of {first.name} over time", "frame", "largest absolute value",
            {"": first.growth}))
    return [Finding(
        "explodes", "warning",
        f"The output of {first.name} ({first.kind}) reaches {first.largest:.2g} at step {trace.last_step + 1}"
        + (f", growing {times:.2g} times from the first frames to the last." if in_time else "."),
        "A recurrence without a bound and without normalisation grows exponentially with the utterance." if in_time
        else "Nothing keeps the scale between the layers; the next step may be infinite.",
        {"largest output": first.largest, "modules above 1e4": [o.name for o in large][:8]},
        [f"a bounded or gated recurrence in {first.name}" if in_time else f"a normalisation before {first.name}",
         f"a lower {trace.key('model.optim.lr')} only delays it"], 0.8 if in_time else 0.6, where=first.name,
         plots=plots)]


PROBES = ("outputs", "lengths", "invariance", "locality", "labels", "loss", "gradients", "depth", "features")


def probe_model(model, report: Report, seconds: float = 30.0) -> Report:
    """The report with what the probes of `check` find in the live model, which is left as it was; causes come first."""
    from dataclasses import replace

    from tools.doctor.engine import examine

    try:
        probed = examine(model=model, seconds=seconds, families=PROBES)
    except Exception as error:  # the run's own report must not be lost for it
        report.not_examined.append(f"probes of the model: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return report
    causes = [f.id for f in probed.findings if f.weight == "prevents"]
    known = {f.id for f in report.findings}
    findings = list(report.findings)
    if causes:
        findings = [
            replace(f, weight="note", symptom=f"{f.symptom} This follows from {', '.join(causes)}: mend that first.")
            if f.id.startswith("run-") and f.weight != "note" else f
            for f in findings
        ]
    findings += [f for f in probed.findings if f.id not in known]
    return Report(findings, [*report.examined, *probed.examined], [*report.ruled_out, *probed.ruled_out],
                  [*report.not_examined, *probed.not_examined])


def save(folder: Path | None, report: Report, trace: Trace, trainer) -> None:
    """Writes `<folder>/doctor/report.json`, `.html` and `curve.csv`; other ranks write theirs where they found
    something."""
    from tools.doctor.html import write

    suffix = "" if trainer.is_global_zero else f"-rank{trainer.global_rank}"
    if folder is None or suffix and not report.findings:
        return
    try:
        if not suffix:
            trace.save(folder / "doctor" / "curve.csv")
        report.save(folder / "doctor" / f"report{suffix}.json")
        write(report, folder / "doctor" / f"report{suffix}.html", folder.name,
              f"step {trace.last_step}" + (f" of {trace.planned}" if trace.planned else ""))
    except OSError as error:
        log.warning("doctor: the report cannot be written to %s: %s", folder, error)


def is_scalar(value) -> bool:
    """Whether a logged metric is one number."""
    return isinstance(value, (int, float)) or (hasattr(value, "numel") and value.numel() == 1)


def settings_of(model):
    """configs.Settings of a live model, None for one that has no configuration."""
    from tools.doctor.configs import Settings

    try:
        return Settings.of_live(model)
    except Exception:  # a model that is not NeMo's may hold anything as _cfg
        return None
