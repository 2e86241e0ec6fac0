"""The doctor during a run, of our recipes, of any NeMo CTC model, of any LightningModule: `callbacks=[Doctor()]`.

At each step it asks once whether loss and gradient are finite; every few steps it looks at the frames, the targets,
the size of the step and the time waited for data; all of that within a share of the run's time (`budget`), less often
where it costs more. A batch that is not finite is computed again, before the optimizer has touched the weights, with
every module watched. It changes nothing in the model and nothing in what is learned. The report is written to
`<run>/doctor/` at the end, at a stop, every minute, and whenever something new that prevents learning is found.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from pathlib import Path

import torch
from lightning.pytorch import Callback
from torch import Tensor

from tools.doctor import devices, listen, saved, utterances
from tools.doctor.alone import alone, possible
from tools.doctor.autopsy import RandomState, broken_parameters, examine_batch, first_bad, loss_scale
from tools.doctor.causes import name_causes
from tools.doctor.drawn import first_of
from tools.doctor.finding import Finding, Report
from tools.doctor.followed import Followed
from tools.doctor.frames import Frames, Gradients, Movement
from tools.doctor.guard import guarded
from tools.doctor.live import (
    follow_rate, keep_gradients, names_of, not_contradicted, optimizer_findings, planned_steps, probe_model, run_folder, save,
    schedule_findings, settings_of, trial_of, validated,
)
from tools.doctor.logs import ended_by, never_began
from tools.doctor.metrics import Tally
from tools.doctor.monitors import monitors_of
from tools.doctor.nonfinite import SCALER_PATIENCE
from tools.doctor.pace import Pace, Waits
from tools.doctor.recount import Recount
from tools.doctor.resumed import other_labels, schedule_over
from tools.doctor.run import diagnose
from tools.doctor.scan import Scan
from tools.doctor.speaking import announce, troubled
from tools.doctor.starts import Starts
from tools.doctor.trace import Trace

log = logging.getLogger("doctor")

BAD_IN_A_ROW = 3  # non-finite steps, parameters still whole, before a run is said to be lost
PROBE_STEPS = 50  # a shorter run that is still on its first plateau is only a trial
SAVE_EVERY = 60.0  # seconds: what a run that is killed leaves of it is no older


class Doctor(Callback):
    """Watches a run; `report()` gives what it knows at any time.

    Args:
        stop: end the run where it cannot learn any more.
        every_n_steps: between two looks at the outputs.
        folder: of the run; default: where the run's loggers write.
        budget: share of the run's time that optional looks may take.
        probe: whether, at the end of a run that did not learn, the model is probed as `check` does.
        recipe, corpus: names of ours, to compare the curve with that of healthy runs.
    """

    def __init__(self, stop: bool = False, every_n_steps: int = 10, folder: str | Path | None = None,
                 budget: float = 0.01, probe: bool = True, recipe: str = "", corpus: str = ""):
        if every_n_steps < 1 or not 0 < budget < 1:
            raise ValueError(f"Doctor(every_n_steps={every_n_steps}, budget={budget}): from 1 up, and between 0 and 1")
        self.stop, self.every_n_steps, self.budget, self.probe = stop, every_n_steps, budget, probe
        self.given_folder, self.recipe, self.corpus = folder, recipe, corpus
        self._listener = listen.CTCListener()
        self._starts = Starts()
        self._begin()

    def _begin(self) -> None:
        """Nothing is known of the run yet; `fit` may be called again, with another model."""
        self.folder = None if self.given_folder is None else Path(self.given_folder)
        self.trace = Trace(recipe=self.recipe, corpus=self.corpus)
        self.fixed: list[Finding] = []  # found once, in the set-up, a scan or the metrics
        self.examined: list[str] = []
        self.not_examined: list[str] = []
        self.pace = Pace(self.every_n_steps, self.budget)
        self._told: set[str] = set()
        self._bad_in_a_row = 0
        self._recent: deque = deque(maxlen=1000)
        self._waits = Waits()
        self._recount = Recount()
        self._model = None
        self._last_norm = self._norm_before = math.nan
        self._saved = time.perf_counter()
        self._ends = self._off = False
        self._asked = 0  # step at which all devices last asked each other whether to end
        self._computes_alone = True
        self._loss: Tensor | None = None
        self._scan = Scan(self.pace)
        self._gradients: Gradients | None = None
        self._followed: Followed | None = None
        self._final: Report | None = None
        self._others: list[dict] = []  # what all ranks have told, at the end

    # ---- the run -------------------------------------------------------------------------------------------

    def setup(self, trainer, pl_module, stage):
        if stage == "fit":
            self._begin()

    @guarded
    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        self.fixed += other_labels(checkpoint, utterances.labels_of(pl_module))

    @guarded
    def on_train_start(self, trainer, pl_module):
        self._model = pl_module
        if any(type(p).__name__ == "DTensor" for p in pl_module.parameters()):
            raise TypeError("each device holds a part of each parameter; runs on one device and with DDP are watched")
        self.folder = self.folder or run_folder(trainer)
        trace = self.trace
        trace.sources = ["callback"]
        trace.planned = planned_steps(trainer)
        trace.clip = float(trainer.gradient_clip_val or 0.0)
        trace.precision = str(trainer.precision)
        trace.optimizer = type(trainer.optimizers[0]).__name__ if trainer.optimizers else ""
        trace.settings = settings_of(pl_module)
        found, trace.warmup = schedule_findings(trainer, trace)
        self.fixed += [*found, *schedule_over(trainer, trace), *trial_of(trainer, trace.settings), *monitors_of(trainer),
                       *self._starts.begin(trainer, pl_module)]
        self.examined = ["run: optimizer and schedule of the live trainer"]
        self._frames = Frames(utterances.labels_of(pl_module))
        self._followed = Followed(trainer, pl_module, trace, self.pace.counted)
        self._listener.open()
        self._computes_alone = possible(trainer)
        self.pace.begun = self._saved = time.perf_counter()
        self._announce(trainer)

    @guarded
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with self.pace.counted() as begin:
            self._waits.begins(begin)
            self._batch = (batch, batch_idx)
            self._step_taken = False
            self._listener.active = True
            self._listener.clear()
            self._loss = None
            self._state = RandomState(pl_module.device)
            step = trainer.global_step
            self._looks = step % self.pace.stride == 0 or step < 5
            self._followed.batch_begins(self._looks, batch)
            self._scan.begin(pl_module, step)

    def _first_step(self, trainer, model) -> None:
        """Looks at the parameters when the first step is to be taken: hooks of the model may have replaced some."""
        self.fixed += optimizer_findings(trainer, model)
        self.trace.first_batch = first_of(trainer, self._batch[0])
        self._movement = Movement(model)
        self._parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._gradients = Gradients(self._parameters)
        if self.fixed:
            self._announce(trainer)

    @guarded
    def on_before_backward(self, trainer, pl_module, loss):
        asks = 0 < trainer.global_step <= 4 and self._batch[1] % trainer.accumulate_grad_batches == 0
        with self.pace.counted(pl_module.device if asks else None):
            if asks:
                self.fixed = keep_gradients(self.fixed, trainer, pl_module)
            self._followed.forward_done(trainer, pl_module)
            self._loss = loss.detach() * trainer.accumulate_grad_batches
            if self._listener.call is None:  # else the loss is the one that was heard
                self._loss /= loss_scale(trainer)
            self.fixed = self._scan.end(self.fixed, self.trace)

    @guarded
    def on_after_backward(self, trainer, pl_module):
        with self.pace.counted():
            self._followed.moved.backward()

    @guarded
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        with self.pace.counted(pl_module.device):
            self._step_taken = True
            if self._gradients is None:
                self._first_step(trainer, pl_module)
            self._followed.before_step(trainer)
            gradients = [p.grad for _, p in self._parameters if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros((), device=pl_module.device)
            self._check_step(trainer, pl_module, norm)
            if self._looks:
                self._movement.before()
                self._gradients.look(self.trace)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._after_batch(trainer, pl_module)
        if self.stop and trainer.world_size > 1:
            self._end_together(trainer, pl_module)

    @guarded
    def _after_batch(self, trainer, pl_module):
        with self.pace.counted(pl_module.device if self._looks or not self._step_taken else None) as begin:
            self.fixed = self._scan.end(self.fixed, self.trace)
            if not self._step_taken:
                self._check_step(trainer, pl_module, None)
            elif self._looks:
                self._look(trainer)
            if self._step_taken and trainer.optimizers:
                self.trace.add("lr", trainer.global_step, float(trainer.optimizers[0].param_groups[0]["lr"]))
            step = trainer.global_step
            self._waits.ends(begin, self.trace, step, self.pace.stride if self._looks else None)
            self._followed.batch_ends(trainer, self._batch[1], asked=self._gradients is not None,
                                      backward=self._loss is not None)
            self._take_found(trainer)
            self._listener.clear()
            self._batch = self._state = None
            if self._step_taken and step and step % (10 * self.every_n_steps) == 0:
                self.trace.thin()
                self.pace.adapt()
                self._announce(trainer)
            if trainer.is_global_zero and time.perf_counter() - self._saved > SAVE_EVERY:
                self._save(trainer, self.report())
        self._waits.rests(True)

    @guarded
    def on_train_epoch_end(self, trainer, pl_module):
        with self.pace.counted(pl_module.device):
            self._followed.epoch_ends(trainer)
            self._take_found(trainer)

    def _take_found(self, trainer) -> None:
        if new := self._followed.taken():
            self.fixed += new
            self._announce(trainer)

    @guarded
    def _end_together(self, trainer, pl_module):
        """Ends the run on all devices where one wants to. All must ask at the same steps, also one that is off: what
        decides is the step alone, and nothing that a device may have seen or failed at."""
        step = trainer.global_step
        if step % (10 * self.every_n_steps) == 0 and step != self._asked:
            self._asked = step
            self._ends = trainer.strategy.reduce_boolean_decision(self._ends, all=False)
            self._stop_now(trainer)

    @guarded
    def on_train_end(self, trainer, pl_module):
        self.trace.ended = True
        self._ask_others(trainer)
        self._finish(trainer)

    @guarded
    def on_exception(self, trainer, pl_module, exception):
        if self.pace.begun is not None and not isinstance(exception, KeyboardInterrupt):
            self.fixed.append(ended_by(exception, self.trace, trainer.checkpoint_callbacks))
        # Whoever ends it by hand or by a signal waits, and kills it after half a minute.
        self._finish(trainer, alone=True, probes=not isinstance(exception, (KeyboardInterrupt, SystemExit)))

    @guarded
    def on_fit_end(self, trainer, pl_module):
        if self._model is None:  # the loop was over before its first batch
            self._final = never_began(trainer, self.folder or run_folder(trainer))

    def teardown(self, trainer, pl_module, stage):
        self._listener.close()

    # ---- validation ----------------------------------------------------------------------------------------

    @guarded
    def on_validation_epoch_start(self, trainer, pl_module):
        self._waits.rests(False)  # the time of a validation is no waiting for data
        if self.pace.begun is not None and not trainer.sanity_checking:
            self._recount.open(trainer, pl_module, self.fixed, self.examined)

    @guarded
    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self._listener.clear()
        self._listener.active = self._recount.hears(dataloader_idx)

    @guarded
    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if self._recount.hears(dataloader_idx):
            with self.pace.counted(pl_module.device):
                self._recount.take(self._listener.call, self.pace.affordable(2.0, least=50.0))
        self._listener.clear()

    @guarded
    def on_validation_end(self, trainer, pl_module):
        if self.pace.begun is None or trainer.sanity_checking:
            return
        with self.pace.counted():
            metrics = validated(trainer, self.trace)
            if (judged := self._recount.close(metrics)) is not None:
                self.examined.append(Tally.title)
                self.fixed += judged
            self._announce(trainer)
        self._waits.rests(False)

    # ---- looking -------------------------------------------------------------------------------------------

    def _check_step(self, trainer, model, norm: Tensor | None) -> None:
        """One question to the device: are loss, log-probs and gradient finite, does every target fit?"""
        call, step = self._listener.call, trainer.global_step
        true = torch.ones((), dtype=torch.bool, device=model.device)
        value = torch.zeros((), device=model.device) if self._loss is None else self._loss
        loss_fine = torch.isfinite(value).all()
        asked = [loss_fine, call.finite() if call else true, true if norm is None else torch.isfinite(norm)]
        need = room = None
        if call is not None:
            need, room = call.room()
            rows = len(room) // utterances.views(self._batch[0], len(room))
            need, room = need[:rows], room[:rows]  # of several views of an utterance the first
            self.trace.utterances_seen += rows
            self.trace.zero_infinity = call.zero_infinity or call.reduction == "none"
            asked.append((need <= room).all())
        numbers = [value.float().mean() if call is None else call.per_label().float(),
                   torch.full_like(true, float("nan"), dtype=torch.float32) if norm is None else norm.float()]
        answers = torch.cat([torch.stack([a.to(model.device).float() for a in asked]), torch.stack(numbers)]).tolist()
        flags, (loss, gradient) = answers[: len(asked)], answers[len(asked):]
        if norm is not None or not (flags[0] and flags[1]):
            self.trace.add("loss", step + 1, loss)
        if norm is not None:
            self.trace.add("grad_norm", step + 1, gradient)
            self._last_norm, self._norm_before = gradient, self._last_norm
        self.trace.loss_unit = "character" if call is not None else "unknown"
        if call is not None and not flags[3]:
            names = []
            if len(self.trace.infeasible) < 20:  # after the first, manifests are read only where there is time
                names = self._names(self._batch[0], model, call, not self.trace.infeasible or self.pace.affordable())
            utterances.note_infeasible(self.trace, self._recent, need, room, names)
        if not (flags[0] and flags[1]) or not flags[2]:
            self._non_finite(trainer, model, call, gradient_only=bool(flags[0] and flags[1]))
        elif norm is not None:
            self._bad_in_a_row = 0

    def _non_finite(self, trainer, model, call, gradient_only: bool) -> None:
        scaler = gradient_only and trainer.precision == "16-mixed"
        self._bad_in_a_row += 1
        if scaler and self._bad_in_a_row < SCALER_PATIENCE:
            return
        self.trace.bad_steps += 1
        if self.trace.bad is None:
            batch, index = self._batch
            bad = examine_batch(model, batch, index, trainer.global_step + 1, self._state, call, gradient_only,
                                self._names(batch, model, call), self._computes_alone)
            self.trace.bad = first_bad(bad, self._norm_before, scaler, gradient_only and trainer.world_size > 1)
        elif self.trace.bad.origin == "loss" and not gradient_only and self.trace.bad_steps == 2 and call is not None \
                and not bool(torch.isfinite(call.log_probs).all()):
            self.trace.bad.details["log-probs not finite from step"] = trainer.global_step + 1
        lost = self._bad_in_a_row >= BAD_IN_A_ROW
        if lost or self.trace.bad_steps == 1:
            self._announce(trainer, lost=lost)

    def _names(self, batch, model, call, look_up: bool = True) -> list[str]:
        return names_of(batch, model, call, self.trace.settings if look_up else None)

    def _look(self, trainer) -> None:
        """Frames, targets and the size of the step, of this batch."""
        step, trace, call = trainer.global_step, self.trace, self._listener.call
        update = self._movement.after()
        if update is not None:
            self.trace.add("update", step, update)
        if call is None or (self.trace.bad is not None and not bool(torch.isfinite(call.log_probs).all())):
            return
        self._frames.look(trace, call, step, self.pace.affordable() and step % (20 * self.pace.stride) == 0)
        self._followed.deliver(self._batch[0], self._model, call)

    # ---- speaking ------------------------------------------------------------------------------------------

    def report(self, probes: bool = False) -> Report:
        """What is known now; `probes` also examines the live model as `check` does, which takes seconds. After the
        end it is what was written then."""
        if self._final is not None:
            return self._final
        if not (self.examined or self.fixed or self.trace.series):
            return Report(not_examined=["run: it has not begun"])
        found, ruled_out, missing = self._found()
        found = devices.joined(found, self._others, 0)
        recount = [self._recount.why_not] if self._recount.why_not and Tally.title not in self.examined else []
        looked, missed = self._followed.lines if self._followed is not None else ([], [])
        looked = ["run: outputs of all modules"] * self._scan.done + looked
        report = Report(found, [saved.head(self.trace.last_step), *self.examined, *looked], ruled_out,
                        [*missing, *self.not_examined, *missed, *recount])
        if probes and self._model is not None and self._computes_alone:
            with alone():  # asked of one rank only, in a run on several devices
                report = probe_model(self._model, report)
        elif probes:
            report.not_examined.append("the model: it cannot be computed on one device alone")
        report.findings = follow_rate(name_causes(not_contradicted(report.findings, self.trace)))
        report.sort()
        report.ruled_out = sorted(set(report.ruled_out) - set(report.ids))
        return report

    def _found(self) -> tuple[list[Finding], list[str], list[str]]:
        """What was found at once and what the curves say; as `diagnose`."""
        found, ruled_out, missing = diagnose(self.trace)
        fixed_ids = {finding.id for finding in self.fixed}
        return [*self.fixed, *[finding for finding in found if finding.id not in fixed_ids]], ruled_out, missing

    def _announce(self, trainer, lost: bool = False) -> None:
        """Says what is new, once; stops the run where asked to and it is lost."""
        report = self.report()
        if announce(trainer, report, self._told):
            self._save(trainer, report)
        # A single batch that is not finite may be survived: then the parameters are whole afterwards.
        self._ends = lost or any(f.weight == "prevents" and f.confidence >= 0.7 for f in report.findings
                                 if self.trace.bad is None or self._broken())
        if trainer.world_size == 1:
            self._stop_now(trainer, report.verdict)

    def _stop_now(self, trainer, why: str = "") -> None:
        if self.stop and self._ends and not trainer.should_stop:
            log.warning("doctor: the run is stopped at step %d. %s", trainer.global_step, why)
            trainer.should_stop = True

    def _broken(self) -> bool:
        return self._bad_in_a_row >= BAD_IN_A_ROW or bool(broken_parameters(self._model))

    def _ask_others(self, trainer) -> None:
        """At the end of a run on several devices: rank 0 learns what the others have seen. No rank may leave it out."""
        self._others = devices.ask(trainer, self.trace, lambda: self.report().findings, self.pace.cost)

    def _save(self, trainer, report: Report, alone: bool = False) -> None:
        save(self.folder, report, self.trace, trainer, alone)
        self._saved = time.perf_counter()

    def _finish(self, trainer, alone: bool = False, probes: bool = True) -> None:
        self._listener.close()
        self._scan.stop()
        if self.pace.begun is None:
            return
        self._followed.moved.close()
        self._starts.end(self.trace)
        self.examined = [line for line in self.examined if not line.startswith("cost:")]
        self.examined.append(f"cost: {self.pace.share()}")
        over = self.trace.ended and self.trace.last_step >= PROBE_STEPS
        probes = probes and self.probe and troubled(self._found()[0], over)
        if probes and trainer.world_size > 1:
            self.not_examined.append(devices.NOT_PROBED)
        report = self.report()
        self._save(trainer, report, alone)  # before the probes, which take seconds: nobody may wait for them
        if probes and trainer.world_size == 1:
            report = self.report(probes=True)
            self._save(trainer, report, alone)
        self.pace.begun, self._final = None, report
