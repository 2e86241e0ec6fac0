"""During a run: steps that are never made, or taken back before the next; labels of the checkpoint gone on from."""

import copy

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from nemo.collections.asr.models import EncDecCTCModel

from tests.tools.doctor.faults.average_copied_back import Average
from tests.tools.doctor.setups import models, tones
from tests.tools.doctor.setups.runs import fit
from tools.doctor import Doctor
from tools.doctor.resumed import other_labels


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return tones.manifests(tmp_path_factory.mktemp("tones"), count=40)


def trained(given, folder, *callbacks, cls=EncDecCTCModel, steps=24, **settings):
    model = models.build(models.section("rnn", given, width=32, **models.datasets(given, batch_size=8)), cls=cls)
    doctor = Doctor()
    assert fit(model, folder, steps, [*callbacks, doctor], **settings) is None
    return doctor, model


class SwappedIn(Callback):
    """As it should be: in the model for a validation only."""

    def on_train_batch_end(self, trainer, model, *_):
        held = copy.deepcopy(model.state_dict())
        model.load_state_dict({name: 0.5 * value for name, value in held.items()})
        model.load_state_dict(held)


class StepsByItself(EncDecCTCModel):
    """Adds up `every` batches before it steps, by hand."""

    every = 16

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)["loss"]
        self.manual_backward(loss / self.every)
        if (batch_idx + 1) % self.every == 0:
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()


class StopsAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= self.step


class Uphill(EncDecCTCModel):
    """An optimizer of its own, that goes up."""

    def configure_optimizers(self):
        self._optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, maximize=True)  # NeMo looks at it
        return self._optimizer


def test_an_optimizer_that_goes_up(given, tmp_path):
    doctor, _ = trained(given, tmp_path, cls=Uphill, steps=60)
    found = doctor.report().findings[0]
    assert (found.id, found.weight) == ("step-uphill", "prevents")
    assert found.evidence["cosine with the way down, median"] < -0.1


class Momentum(EncDecCTCModel):
    def configure_optimizers(self):
        self._optimizer = torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.95, weight_decay=1e-2)
        return self._optimizer


def test_momentum_goes_down_all_the_same(given, tmp_path):
    doctor, _ = trained(given, tmp_path, cls=Momentum, steps=60)
    assert len(doctor.trace.values("downhill")) > 5 and "step-uphill" not in doctor.report().ids


@pytest.mark.parametrize("own_steps, found", [(12, True), (200, False)])
def test_a_schedule_that_was_over_when_the_run_went_on(given, tmp_path, own_steps, found):
    def model():
        sched = {"name": "CosineAnnealing", "warmup_steps": 2, "min_lr": 0.0}
        optim = {"name": "adamw", "lr": 1e-3, "sched": sched}
        return models.build(models.section("rnn", given, width=32, optim=optim, **models.datasets(given, batch_size=8)))

    first, settings = model(), {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "limit_val_batches": 0,
                                "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = Trainer(max_steps=own_steps, callbacks=[StopsAt(12)], **settings)
    first.set_trainer(trainer)
    first.setup_training_data(first.cfg.train_ds)
    trainer.fit(first)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    second, doctor = model(), Doctor(folder=tmp_path / "run")
    second.setup_training_data(second.cfg.train_ds)
    trainer = Trainer(max_steps=100, callbacks=[doctor, StopsAt(14)], **settings)
    second.set_trainer(trainer)
    trainer.fit(second, ckpt_path=tmp_path / "first.ckpt")
    said = [f for f in doctor.report().findings if f.id == "lr-too-low"]
    assert bool(said) is found and (not found or "goes on from step 12" in said[0].symptom)


def test_a_trial_left_in_the_trainer(given, tmp_path):
    doctor, _ = trained(given, tmp_path, steps=4, limit_train_batches=1)
    assert "limit_train_batches=1" in next(f for f in doctor.report().findings if f.id == "data-filtered").symptom


def test_an_average_that_is_copied_back(given, tmp_path):
    doctor, _ = trained(given, tmp_path, Average())
    found = doctor.report().findings[0]
    assert (found.id, found.weight) == ("weights-not-moved", "prevents")
    assert found.evidence["share taken back"] == pytest.approx(0.999, abs=2e-3)


def test_a_healthy_run_and_an_average_that_is_swapped_in_and_out(given, tmp_path):
    for name, callbacks in (("plain", []), ("swapped", [SwappedIn()])):
        doctor, model = trained(given, tmp_path / name, *callbacks)
        assert len(doctor.trace.values("undone")) >= 3 and max(map(abs, doctor.trace.values("undone"))) < 1e-3
        assert "weights-not-moved" in doctor.report().ruled_out
        assert not doctor._followed.moved._handles


def test_batches_without_a_step(given, tmp_path):
    doctor, _ = trained(given, tmp_path, cls=StepsByItself, steps=-1, max_epochs=3, gradient_clip_val=None)
    found = doctor.report().findings[0]
    assert (found.id, found.weight, found.where) == ("weights-not-moved", "prevents", "training_step")
    assert found.evidence["batches"] == 10 and "no optimizer step" in found.symptom


def test_steps_by_hand_and_accumulated_ones_are_steps(given, tmp_path):
    class Often(StepsByItself):
        every = 2

    for name, cls, settings in (("hand", Often, {"gradient_clip_val": None}),
                                ("added", EncDecCTCModel, {"accumulate_grad_batches": 16})):
        doctor, _ = trained(given, tmp_path / name, cls=cls, steps=-1, max_epochs=5, **settings)
        assert "weights-not-moved" not in doctor.report().ids


def test_probes_that_are_asked_for_are_made(given, tmp_path):
    class Asks(Callback):
        def on_train_batch_end(self, trainer, model, *_):
            if trainer.global_step == 6:
                self.report = doctor.report(probes=True)
                self.weights = [p.detach().clone() for p in model.parameters()]

        def on_train_batch_start(self, trainer, model, *_):
            if trainer.global_step == 6:
                assert all(torch.equal(p, old) for p, old in zip(model.parameters(), self.weights))

    model = models.build(models.section("rnn", given, width=32, **models.datasets(given, batch_size=8)))
    doctor, asks = Doctor(), Asks()
    assert fit(model, tmp_path, 8, [doctor, asks]) is None
    assert {"batch-leak", "length-mismatch"} <= set(asks.report.ruled_out)


def test_labels_of_the_checkpoint(given):
    labels = list("abc")
    saved = {"hyper_parameters": {"cfg": {"labels": list("cab")}}}
    found = other_labels(saved, labels)
    assert [(f.id, f.weight, f.evidence["labels that differ"]) for f in found] == [("label-order", "prevents", 3)]
    assert "another order" in found[0].symptom and "'c'" in found[0].symptom
    assert not other_labels({"hyper_parameters": {"labels": labels}}, labels) and not other_labels({}, labels)
    assert not other_labels(saved, [])
