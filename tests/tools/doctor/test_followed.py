"""During a run: gradients cleared before the step, weights that jump, eval mode left on, schedules stepped too often, fits in a
loop, utterances that are never drawn."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from nemo.collections.asr.models import EncDecCTCModel

from tests.tools.doctor.setups import models, tones
from tests.tools.doctor.setups.runs import fit
from tests.tools.doctor.test_moved import StepsByItself, SwappedIn, trained
from tests.tools.doctor.test_runs_of_others import logged
from tools.doctor import Doctor
from tools.doctor.causes import name_causes
from tools.doctor.engine import examine
from tools.doctor.explain import read_run
from tools.doctor.finding import Finding
from tools.doctor.rates import learning_rate
from tools.doctor.ticks import Ticks
from tools.doctor.trace import Trace


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return tones.manifests(tmp_path_factory.mktemp("tones"), count=40)


def named(doctor, fault):
    return [f for f in doctor.report().findings if f.id == fault]


# ---- gradients that are gone when the step is made ----------------------------------------------------------------


class ByHand(StepsByItself):
    """`order` of what follows the forward pass."""

    order = "backward step zero"
    attached = False

    def training_step(self, batch, batch_idx):
        loss = EncDecCTCModel.training_step(self, batch, batch_idx)["loss"]
        optimizer = self.optimizers()
        do = {"backward": lambda: self.manual_backward(loss), "step": optimizer.step, "zero": optimizer.zero_grad,
              "schedule": lambda: self.lr_schedulers().step()}
        for word in self.order.split():
            do[word]()
        return loss if self.attached else loss.detach()


class ClearedTooEarly(ByHand):
    order = "backward zero step"


def test_gradients_cleared_between_backward_and_step(given, tmp_path):
    doctor, _ = trained(given, tmp_path, cls=ClearedTooEarly, steps=60, gradient_clip_val=None)
    first = doctor.report().findings[0]
    assert (first.id, first.weight, first.where) == ("weights-not-moved", "prevents", "training_step")
    assert "there after the backward pass" in first.symptom
    assert not {"lr-too-low", "no-gradient"} & {f.id for f in doctor.report().of_weight("prevents")}
    after = examine(run=tmp_path / "lightning_logs" / "version_0", families=["run"]).findings[0]
    assert after.id == "weights-not-moved" and "cleared" in after.cause


@pytest.mark.parametrize("order, attached", [("backward step zero", False), ("zero backward step", True)])
def test_a_step_by_hand_that_gives_its_loss_to_the_log_alone(given, tmp_path, order, attached):
    cls = type("Right", (ByHand,), {"order": order, "attached": attached})
    doctor, model = trained(given, tmp_path, cls=cls, steps=12, gradient_clip_val=None)
    assert set(doctor.trace.values("cleared")) == {0.0}
    report = doctor.report()
    assert not report.of_weight("prevents") and "weights-not-moved" in report.ruled_out
    doctor._final = None
    probed = doctor.report(probes=True)
    assert "no-gradient" in probed.ruled_out and not probed.of_weight("prevents"), probed.findings


# ---- weights that are written between an epoch and the next -------------------------------------------------------


class AtEpochs(Callback):
    def __init__(self, change):
        self.change = change

    def on_train_epoch_start(self, trainer, model):
        self.change(model, trainer.current_epoch)


def fresh_decoder(model, epoch):
    for layer in model.decoder.modules():
        if isinstance(layer, torch.nn.Conv1d):
            layer.reset_parameters()


class Restores:
    def __call__(self, model, epoch):
        if epoch == 0:
            self.held = copy.deepcopy(model.state_dict())
        model.load_state_dict(self.held)


@pytest.mark.parametrize("change, where", [(fresh_decoder, "decoder"), (Restores(), "encoder")])
def test_what_an_epoch_has_learned_is_thrown_away(given, tmp_path, change, where):
    doctor, _ = trained(given, tmp_path, AtEpochs(change), steps=18)
    first = doctor.report().findings[0]
    assert (first.id, first.weight) == ("weights-not-moved", "prevents") and first.where.startswith(where)
    assert first.evidence["after steps"] == [5, 10]


def test_epochs_that_leave_the_weights_alone(given, tmp_path):
    once = AtEpochs(lambda model, epoch: fresh_decoder(model, epoch) if epoch == 1 else None)
    for name, callbacks, jumps in (("plain", [], 0), ("swapped", [SwappedIn()], 0), ("once", [once], 1)):
        doctor, _ = trained(given, tmp_path / name, *callbacks, steps=18)
        assert doctor._followed._jumps.looks >= 3 and len(doctor._followed._jumps.jumps) == jumps
        assert not named(doctor, "weights-not-moved")


# ---- eval mode --------------------------------------------------------------------------------------------------


class Samples(Callback):
    """Puts `part` of the model into eval mode, and leaves it so."""

    def __init__(self, part=lambda model: [model], freeze=False):
        self.part, self.freeze = part, freeze

    def on_train_batch_start(self, trainer, model, *_):
        for module in self.part(model):
            module.eval().requires_grad_(not self.freeze)


def test_eval_mode_left_on(given, tmp_path):
    doctor, _ = trained(given, tmp_path, Samples(), steps=8)
    (found,) = named(doctor, "train-eval-differ")
    assert found.weight == "warning" and found.evidence["model.training"] is False
    assert doctor.report().findings[0] is found or doctor.report().findings[0].id == "data-slow"


def norms(model):
    return [m for m in model.modules() if hasattr(m, "running_mean")]


@pytest.mark.parametrize("part, freeze", [(lambda model: [model.encoder], True), (norms, False)])
def test_what_is_put_into_eval_mode_on_purpose(given, tmp_path, part, freeze):
    config = models.section("quartznet", given, **models.datasets(given, batch_size=8))
    doctor = Doctor()
    assert fit(models.build(config), tmp_path, 8, [Samples(part, freeze), doctor]) is None
    assert not named(doctor, "train-eval-differ")


def test_no_padding_is_counted_by_normalisations_in_eval_mode():
    padding = Finding("norm-padding", "warning", "counts padding in training.", "", {"change of mean and variance": {}}, [], 0.3)
    mode = Finding("train-eval-differ", "warning", "in eval mode.", "", {"normalisations in eval mode": "7 of 7"}, [], 0.95)
    assert [f.id for f in name_causes([padding, mode])] == ["train-eval-differ"]
    mode.evidence["normalisations in eval mode"] = "0 of 7"
    assert {f.id for f in name_causes([padding, mode])} == {"norm-padding", "train-eval-differ"}


# ---- schedules ----------------------------------------------------------------------------------------------------


class SteppedTwice(EncDecCTCModel):
    def on_train_batch_end(self, *_):
        self.lr_schedulers().step()


def test_a_schedule_that_is_stepped_by_lightning_and_by_hand(given, tmp_path):
    doctor, _ = trained(given, tmp_path, cls=SteppedTwice, steps=40)
    (found,) = named(doctor, "schedule-per-epoch")
    assert found.weight == "warning" and 17 <= found.evidence["over at step"] <= 23
    assert not named(trained(given, tmp_path / "right", steps=40)[0], "schedule-per-epoch")


class OneStepOfTwo(ByHand):
    """Adds up two batches; its schedule counts batches, `length` of them."""

    length = 40

    def configure_optimizers(self):
        optimizer = self._optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.length)]

    def training_step(self, batch, batch_idx):
        self.order = "backward schedule step zero" if self.trainer.fit_loop.total_batch_idx % 2 else "backward schedule"
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("length, found", [(40, False), (20, True)])
def test_a_schedule_of_batches_is_right_where_it_is_made_for_them(given, tmp_path, length, found):
    cls = type("Own", (OneStepOfTwo,), {"length": length})
    doctor, _ = trained(given, tmp_path, cls=cls, steps=20, gradient_clip_val=None)
    assert bool(named(doctor, "schedule-per-epoch")) is found


def test_a_schedule_that_goes_on_from_a_checkpoint_counts_from_there():
    schedule = SimpleNamespace(last_epoch=500, max_steps=1000, base_lrs=[1e-3])
    trainer = SimpleNamespace(lr_scheduler_configs=[SimpleNamespace(scheduler=schedule, reduce_on_plateau=False,
                                                                    interval="step")])
    ticks, trace = Ticks(), Trace(planned=1000)
    assert ticks.look(trainer, 250, trace) is None
    schedule.last_epoch = 512
    assert ticks.look(trainer, 262, trace) is None
    schedule.last_epoch = 540
    found = ticks.look(trainer, 270, trace)
    assert found.evidence["steps of the schedule"] == 40 and found.evidence["over at step"] == 500


@pytest.mark.parametrize("over, said", [(30, True), (60, False)])
def test_a_rate_at_its_lowest_long_before_the_end_of_its_schedule(tmp_path, over, said):
    rows = [{"step": s, "train_loss": 300.0 - s, "learning_rate": 1e-6 + 1e-3 * max(1 - s / over, 0.0)} for s in range(60)]
    logged(tmp_path / "metrics.csv", rows)
    optim = {"name": "adamw", "lr": 1e-3, "sched": {"name": "CosineAnnealing", "max_steps": 60, "min_lr": 1e-6}}
    (tmp_path / "hparams.yaml").write_text(json.dumps({"cfg": {"encoder": {}, "decoder": {}, "optim": optim}}))
    found = [f for f in examine(run=tmp_path, families=["run"]).findings if f.id == "schedule-per-epoch"]
    assert bool(found) is said and (not said or found[0].evidence["at its lowest from step"] == 30)
    trace = read_run(tmp_path)
    assert trace.get("lr") and not [f for f in learning_rate(trace) if f.id == "schedule-per-epoch"]  # no configuration


# ---- begun anew -----------------------------------------------------------------------------------------------------


def fits(given, folder, doctor, times, **sched):
    optim = {"name": "adamw", "lr": 1e-3, "sched": {"name": "CosineAnnealing", "min_lr": 0.0, **sched}}
    model = models.build(models.section("rnn", given, width=32, optim=optim, **models.datasets(given, batch_size=8)))
    model.setup_training_data(model.cfg.train_ds)
    for _ in range(times):
        trainer = Trainer(max_steps=6, accelerator="cpu", logger=False, enable_checkpointing=False, limit_val_batches=0,
                          enable_progress_bar=False, enable_model_summary=False, callbacks=[doctor])
        model.set_trainer(trainer)
        trainer.fit(model)


def test_a_fit_in_a_loop_is_said(given, tmp_path):
    doctor = Doctor(folder=tmp_path, probe=False)
    fits(given, tmp_path, doctor, 4, warmup_steps=50)
    (found,) = named(doctor, "run-ended")
    assert found.weight == "warning" and "fit() number 4" in found.symptom and found.evidence["steps of each"] == [6, 6, 6]
    finished = Doctor(folder=tmp_path, probe=False)
    fits(given, tmp_path, finished, 4, warmup_steps=1)  # each comes to its schedule's end
    assert not named(finished, "run-ended")
    other = Doctor(folder=tmp_path, probe=False)
    for _ in range(3):  # models of their own
        fits(given, tmp_path, other, 1, warmup_steps=50)
    assert not named(other, "run-ended")


def jobs(folder, losses, rate=lambda job, s: 1e-5 * (s + 1)):
    for job, (first, last) in enumerate(losses):
        logged(folder / f"version_{job}" / "metrics.csv", [
            {"step": s, "train_loss": first + (last - first) * s / 24, "learning_rate": rate(job, s)} for s in range(25)],
            age=100 - job)


@pytest.mark.parametrize("losses, rate, said", [
    ([(340, 260), (250, 190), (185, 150)], None, True),
    ([(340, 260), (335, 250), (345, 190)], None, False),  # a comparison of three
    ([(340, 260), (250, 190), (185, 150)], lambda job, s: 1e-5 * (s + 1) / 10**job, False),  # stages of a fine-tuning
])
def test_jobs_that_take_over_weights_alone(tmp_path, losses, rate, said):
    jobs(tmp_path, losses, *([rate] if rate else []))
    report = examine(run=tmp_path, families=["run"])
    found = [f for f in report.findings if f.id == "run-ended"]
    assert bool(found) is said
    assert not said or "3 times, each time from step 0, with the weights" in report.findings[0].symptom


# ---- a sampler of a few ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power, weight", [(0.0, None), (3.0, "warning"), (1000.0, "prevents")])
def test_utterances_that_are_never_drawn(given, tmp_path, power, weight):
    model = models.build(models.section("rnn", given, width=32, **models.datasets(given, batch_size=8)))
    model.setup_training_data(model.cfg.train_ds)
    data = model._train_dl.dataset
    weights = torch.softmax(power * torch.arange(len(data)).double() / 8, 0)
    sampler = torch.utils.data.WeightedRandomSampler(weights, len(data), generator=torch.Generator().manual_seed(1))
    model._train_dl = torch.utils.data.DataLoader(data, batch_size=8, sampler=sampler, collate_fn=data.collate_fn)
    doctor = Doctor(probe=False)
    assert fit(model, tmp_path, 7, [doctor]) is None
    assert [f.weight for f in named(doctor, "data-filtered")] == ([weight] if weight else [])


def test_an_epoch_of_all_and_the_same_text_by_many(given, tmp_path):
    doctor, _ = trained(given, tmp_path, steps=7)
    assert doctor._followed._drawn.judged and not named(doctor, "data-filtered")
