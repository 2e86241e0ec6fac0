"""What a live trainer, model and optimizer tell at once: plan, folder, idle parameters, schedule, outputs."""

from __future__ import annotations

import copy
import logging
import math
import sys
import warnings
from dataclasses import replace
from pathlib import Path

from tools.doctor import utterances
from tools.doctor.finding import Finding, Report
from tools.doctor.trace import Trace
from tools.doctor.trained import copies, judged, left_out, started_from
from tools.doctor.trials import is_epoch_by_number, left_from_a_trial

log = logging.getLogger("doctor")

SHORT = 20  # steps within which a schedule rises that may be made for epochs
MOST_REHEARSED = 5000  # steps of a schedule


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
    root = Path(trainer.default_root_dir) if trainer.default_root_dir else None
    state = sys.modules.get("nemo.utils.app_state")
    folder = getattr(state.AppState(), "log_dir", None) if state is not None else None
    # One of the process, which an earlier trainer's exp_manager may have left: it gives its own trainer this root.
    if folder and root is not None and Path(folder).absolute() == root.absolute():
        return root
    if trainer.loggers and (folder := trainer.log_dir):
        return Path(folder)
    return root


def optimizer_findings(trainer, model) -> list[Finding]:
    """Parameters that should be trained and are in no optimizer, and those that are frozen."""
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    if not held:
        return []
    wanted = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    missing = {name: p for name, p in wanted if id(p) not in held}
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    every = max(sum(p.numel() for p in model.parameters()), 1)
    started = started_from(settings_of(model), model, trainer, [name for name, _ in wanted])
    random, seen = judged(frozen, started)
    if not holds_parameters(trainer) or copies(missing, {name: p for name, p in wanted if name not in missing}):
        missing = {}
    forgotten, why = left_out(missing, started)
    found = []
    for id_, rows, what, cause, fix in (
        ("not-in-optimizer", missing, "are in no optimizer",
         f"They keep the values they were made with. {why}".rstrip(),
         "build the optimizer from model.parameters(), after the last layer has been made"),
        ("frozen", frozen, "are frozen (requires_grad=False)", f"They keep the values that they have. {seen}",
         "model.unfreeze(), or p.requires_grad_(True)"),
    ):
        share = sum(p.numel() for p in rows.values()) / every
        # Some parts are frozen on purpose: windows, filters, a pretrained encoder.
        heavy = share > 0.01 and forgotten if id_ == "not-in-optimizer" else share > 0.9 and random
        if share < 1e-4:
            continue
        first = next(iter(rows))
        found.append(Finding(
            id_, "prevents" if heavy else "warning",
            f"{len(rows)} parameter tensors ({share:.0%} of all values) {what}, first {first}.", cause,
            {"parameters": list(rows)[:12], "share of all values": share}, [fix], 0.95 if heavy else 0.6, where=first))
    return found


def holds_parameters(trainer) -> bool:
    """Whether the optimizers hold the model's own parameters, and no flat partitions of them as DeepSpeed's do."""
    from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy

    strategy = getattr(trainer, "strategy", None)
    return strategy is None or isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) and not isinstance(
        strategy, DeepSpeedStrategy)


def keep_gradients(findings: list[Finding], trainer, model) -> list[Finding]:
    """The findings, with one more where gradients of the step before are still there when the next backward begins."""
    if any(finding.id == "gradients-kept" for finding in findings) or not model.automatic_optimization:
        return findings
    # What is in no optimizer is never zeroed, and never moved: that is another finding.
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    kept = [name for name, p in model.named_parameters()
            if id(p) in held and p.grad is not None and bool((p.grad != 0).any())]
    if not kept:
        return findings
    return [*findings, Finding(
        "gradients-kept", "prevents",
        f"When the backward pass of step {trainer.global_step + 1} begins, {len(kept)} parameters still hold the "
        "gradient of the step before.",
        "Nothing sets gradients to zero: each step is made with the sum of all gradients since the start, which is a "
        "direction of long ago and grows from step to step.",
        {"parameters": kept[:8], "of them": len(kept)},
        ["leave optimizer_zero_grad to Lightning: delete the override, or call optimizer.zero_grad() in it"], 0.97,
        where="optimizer_zero_grad")]


def schedule_findings(trainer, trace: Trace) -> tuple[list[Finding], int | None]:
    """(findings, warm-up in optimizer steps or None) of the live schedulers."""
    found, warmup = [], None
    stepped = getattr(trainer.lightning_module, "automatic_optimization", True)  # by Lightning, else by the model
    for config in trainer.lr_scheduler_configs:
        ticks = getattr(config.scheduler, "warmup_steps", None)
        if stepped and config.interval == "epoch" and not config.reduce_on_plateau:
            epochs = planned_epochs(trainer)
            found += hardly_rising(config.scheduler, epochs, trace.planned, max(config.frequency, 1))
            # Of a schedule that is stepped once an epoch, these are epochs.
            ticks = ticks * trace.planned / epochs if ticks and trace.planned and epochs else None
        warmup = ticks or warmup
    if not trainer.lr_scheduler_configs and trainer.optimizers and trace.optimizer.lower() not in ("novograd", "sgd"):
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        if rate > 3e-3:
            found.append(Finding(
                "warmup-missing", "warning",
                f"There is no schedule: {trace.optimizer} takes its first step at {rate:.2g}.",
                "The first gradients of CTC are large and point to blanks; full steps along them saturate the outputs.",
                {"learning rate": rate}, [f"{trace.key('model.optim.sched.name')}=CosineAnnealing with warmup_steps "
                                          "of a tenth of the run"], 0.6, where=trace.key("model.optim.sched")))
    return [*found, *rate_kept(trainer, trace)], int(warmup) if warmup else None


def rate_kept(trainer, trace: Trace) -> list[Finding]:
    """A finding where a run goes on with the learning rate of its checkpoint, and the configuration has another."""
    asked = trace.settings.number("model.optim.lr") if trace.settings is not None else None
    if not trainer.global_step or not asked:
        return []
    from nemo.core.classes import ModelPT

    nemos = all(type(config.scheduler).__module__.startswith("nemo.") for config in trainer.lr_scheduler_configs)
    if type(trainer.lightning_module).configure_optimizers is not ModelPT.configure_optimizers or not nemos:
        return []  # one's own may take its rate from elsewhere, and torch's cycles begin below it
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    kept = [float(group.get("initial_lr", group["lr"])) for group in groups]
    if not kept or any(abs(rate - asked) <= 0.01 * asked for rate in kept):
        return []
    key = trace.key("model.optim.lr")
    return [Finding(
        "lr-too-low" if max(kept) < asked else "lr-too-high", "warning",
        f"The configuration has {key}={asked:g}; the run goes on from step {trainer.global_step} with {max(kept):g}, that "
        "of its checkpoint.",
        "fit(ckpt_path=...) restores optimizer and schedule with their rates, after they were made from the configuration: "
        "what was changed there since is not looked at.",
        {"in the configuration": asked, "in the optimizer": sorted(set(kept)), "step": trainer.global_step},
        ["init_from_ptl_ckpt=... or init_from_nemo_model=... (the weights alone, a new optimizer and schedule) in place of "
         "ckpt_path and resume_if_exists", f"{key}={max(kept):g}, if the run is to go on as it was"], 0.9, where=key)]


def trial_of(trainer, settings) -> list[Finding]:
    """A finding where the trainer takes only some batches of its data, as for trying a program out."""
    given = {name: getattr(trainer, name, None) for name in ("fast_dev_run", "overfit_batches", "limit_train_batches")}
    try:
        batches = len(trainer.train_dataloader)
    except (TypeError, NotImplementedError):  # nobody knows how many there are
        batches = None
    if settings is not None and is_epoch_by_number(
        settings, given["limit_train_batches"], batches, trainer.accumulate_grad_batches
    ):
        given["limit_train_batches"] = None
    found = left_from_a_trial(given, batches)
    return [] if found is None else [found]


def hardly_rising(scheduler, epochs: int | None, steps: int | None, frequency: int = 1) -> list[Finding]:
    """A finding where a schedule that is stepped once an epoch stays low over the run, and once a step would not.

    One that is at half of its height after SHORT steps or fewer may well be made for epochs, in a run that is only a
    trial: of that a warning.
    """
    if epochs is None or steps is not None and epochs >= 0.5 * steps:
        return []
    if (seen := stays_low(scheduler, epochs // frequency, steps)) is None:
        return []
    by_epoch, by_step, half = seen
    kind, long = type(scheduler).__name__, half > SHORT
    return [Finding(
        "schedule-per-epoch", "prevents" if long else "warning",
        f"{kind} is stepped once an epoch: in the {epochs} epochs of this run the rate gets to {by_epoch:.2g}; stepped "
        f"at each of the {'' if steps is None else f'{steps} '}steps it would reach {by_step:.2g}.",
        "Lightning steps a schedule once an epoch where configure_optimizers does not say otherwise. A warm-up of so "
        "many steps then lasts so many epochs." if long else
        f"The run ends before the schedule, which gets to half of its height at its step {half}, has risen: it counts "
        "steps, or it counts epochs and the run is shorter than it was made for.",
        {"scheduler": kind, "interval": "epoch", "epochs": epochs, "steps": steps, "half of its height at": half,
         "highest rate by epochs": by_epoch, "by steps": by_step},
        ['return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}} from '
         "configure_optimizers"], 0.95 if long else 0.6, where="configure_optimizers")]


def stays_low(scheduler, epochs: int, steps: int | None) -> tuple[float, float, int] | None:
    """(highest rate when stepped once an epoch, once a step, step at which it is at half of its height), where the
    first is at most half of the second; None where it is not, and where the schedule cannot be rehearsed.

    Whatever its class: it is its rates over the run's epochs that count.
    """
    try:
        rates = rehearsed(scheduler, MOST_REHEARSED)
    except Exception:  # anybody's schedule
        return None
    by_epoch = max(rates[: max(epochs, 1)])  # one epoch's steps see the rate before the epoch's end
    by_step = max(rates[: None if steps is None else steps + 1])
    if not by_epoch <= 0.5 * by_step:
        return None
    return by_epoch, by_step, next(k for k, rate in enumerate(rates) if rate >= 0.5 * max(rates))


def planned_epochs(trainer) -> int | None:
    """Epochs that the run will have; None where that is not known."""
    limits = []
    if trainer.max_epochs and trainer.max_epochs > 0:
        limits.append(int(trainer.max_epochs))
    batches = trainer.num_training_batches
    if trainer.max_steps > 0 and isinstance(batches, (int, float)) and math.isfinite(batches) and batches > 0:
        limits.append(math.ceil(trainer.max_steps * trainer.accumulate_grad_batches / batches))
    return min(limits, default=None)


def rehearsed(scheduler, steps: int) -> list[float]:
    """The highest rate of a schedule's groups now and after each of so many steps, on a copy: nothing is stepped.

    It ends where the schedule refuses to go on: after its total of steps, or with a `step` of other arguments.
    """
    copied = _apart(scheduler, {})
    rates = [max(float(group["lr"]) for group in copied.optimizer.param_groups)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no optimizer step between
        for _ in range(steps):
            try:
                copied.step()
            except Exception:  # anybody's schedule
                break
            rates.append(max(float(group["lr"]) for group in copied.optimizer.param_groups))
    return rates


def _apart(scheduler, optimizers: dict):
    """A copy of a schedule, and of those it is made of, around an optimizer that holds rates and no weights."""
    copied = copy.copy(scheduler)
    own = scheduler.optimizer
    if id(own) not in optimizers:
        # Its kind matters to some schedules (momentum of a cycle), its weights to none.
        stand_in = copy.copy(own)
        # torch fills a rate that is a tensor in place: the real one must not be it.
        stand_in.param_groups = [{key: value.clone() if hasattr(value, "clone") else value
                                  for key, value in group.items() if key != "params"} for group in own.param_groups]
        optimizers[id(own)] = stand_in
    copied.optimizer = optimizers[id(own)]
    if hasattr(scheduler, "_schedulers"):
        copied._schedulers = [_apart(inner, optimizers) for inner in scheduler._schedulers]
    return copied


def follow_rate(findings: list[Finding]) -> list[Finding]:
    """Findings, with outputs that grew large only in training as what a learning rate that is too high has made."""
    if not any(f.id == "lr-too-high" and f.weight == "prevents" for f in findings):
        return findings
    return [replace(f, weight="note", symptom=f"{f.symptom} This follows from lr-too-high: mend that first.")
            if f.id == "explodes" and f.evidence.get("seen at step", 1) > 1 else f for f in findings]


def not_contradicted(findings: list[Finding], trace: Trace) -> list[Finding]:
    """Findings without that of a loss that reaches no parameter, where all had a gradient in the run's own steps: it is
    the probe that does not run the step as the run does."""
    return [f for f in findings if f.id != "no-gradient" or trace.still != []
            or f.evidence.get("not reached") != f.evidence.get("of")]


PROBES = ("outputs", "lengths", "invariance", "locality", "labels", "loss", "gradients", "weights", "neighbours", "depth",
          "features")


def probe_model(model, report: Report, seconds: float = 30.0) -> Report:
    """The report with what the probes of `check` find in the live model, which is left as it was; causes come first."""
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


def save(folder: Path | None, report: Report, trace: Trace, trainer, alone: bool = False) -> None:
    """Writes `<folder>/doctor/report.json`, `.html` and `curve.csv`, at rank 0.

    `alone`: the run has ended in an error, and rank 0 may never hear of it: another rank then writes
    `report-rank<n>.json` where it has found what prevents learning.
    """
    from tools.doctor.html import write

    suffix = "" if trainer.is_global_zero else f"-rank{trainer.global_rank}"
    if folder is None or suffix and not (alone and report.of_weight("prevents")):
        return
    try:
        if not suffix:
            trace.save(folder / "doctor" / "curve.csv")
        report.save(folder / "doctor" / f"report{suffix}.json")
        write(report, folder / "doctor" / f"report{suffix}.html", folder.name,
              f"step {trace.last_step}" + (f" of {trace.planned}" if trace.planned else ""))
    except OSError as error:
        log.warning("doctor: the report cannot be written to %s: %s", folder, error)


def names_of(batch, model, call, settings) -> list[str]:
    """The utterances of a batch; texts are looked up in the train manifests where there are `settings`."""
    try:
        return utterances.of_batch(batch, model, call, settings.manifests.get("train", []) if settings is not None else [])
    except Exception as error:  # a name is a help, its lack no reason to lose the finding
        log.debug("utterances of a batch", exc_info=True)
        return [f"not named: {type(error).__name__}"]


def validated(trainer, trace: Trace) -> dict[str, float]:
    """What a validation has measured; its points go into the trace."""
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items() if is_scalar(value)}
    for key in ("val_loss", "val_wer", "val_cer", "val_blank_rate"):
        if key in metrics:
            trace.add(key, trainer.global_step, metrics[key])
    return metrics


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
