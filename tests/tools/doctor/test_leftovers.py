"""Left-overs of trials, optimizers that do not do what their rate says, filters that keep speech out."""

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from nemo.collections.asr.modules import ConvASRDecoder

import tests.tools.doctor.setups.encoders  # noqa: F401  makes its classes known to NeMo
from tests.tools.doctor.faults import eps_of_one, filters_of_a_bass, optimizer_maximizes, trial_left_over
from tests.tools.doctor.setups import live, models, written
from tools.doctor.delivered import Delivered
from tools.doctor.engine import examine
from tools.doctor.monitors import monitors_of, turned_round
from tools.doctor.rates import learning_rate
from tools.doctor.started import other_features
from tools.doctor.trace import Trace
from tools.doctor.trials import left_from_a_trial


def first(made, *families):
    report = examine(**made, families=families)
    return report.findings[0], report


def test_maximize_goes_up(tmp_path):
    found, _ = first(optimizer_maximizes.make(tmp_path), "optimizer")
    assert (found.id, found.weight) == ("step-uphill", "prevents") and found.evidence["cosine"] > 0.1


def test_eps_far_above_the_gradients(tmp_path):
    found, _ = first(eps_of_one.make(tmp_path), "optimizer")
    assert (found.id, found.where) == ("lr-too-low", "model.optim.eps")
    assert found.evidence["share of a step that is made"] < 0.1 and found.fix == ["model.optim.eps=1e-08"]


@pytest.mark.parametrize("name,rate", [("sgd", 0.1), ("adamw", 2e-3), ("novograd", 0.02), ("adan", 2e-3)])
def test_optimizers_as_they_are_used(tmp_path, name, rate):
    extra = {"momentum": 0.9} if name == "sgd" else {}
    made = written(tmp_path, "rnn", optim={"name": name, "lr": rate, "sched": {"name": "CosineAnnealing", "warmup_steps": 50},
                                           **extra})
    report = examine(**made, families=["optimizer"])
    assert not report.findings, report.findings
    assert "step-uphill" in report.ruled_out


@pytest.mark.parametrize("scaled", [True, False])
def test_adafactor_whose_rate_is_gone_after_some_parameters(tmp_path, scaled):
    made = written(tmp_path, "rnn", optim={"name": "adafactor", "lr": 1e-3, "relative_step": False, "scale_parameter": scaled,
                                           "sched": {"name": "CosineAnnealing", "warmup_steps": 50}})
    report = examine(**made, families=["optimizer"])
    assert [(f.id, "hardly move" in f.symptom) for f in report.findings] == [("lr-too-low", True)] * scaled


@pytest.mark.parametrize("steps, weight", [(60, "warning"), (300, "prevents")])
def test_a_run_too_short_and_too_slow_to_move_anything(tmp_path, steps, weight):
    made = written(tmp_path, "rnn", trainer={"max_steps": steps}, optim={"name": "sgd", "lr": 2e-5, "sched": None})
    found, _ = first(made, "optimizer")
    assert (found.id, found.weight) == ("lr-too-low", weight) and "of their size" in found.symptom


def test_adadelta_at_the_rate_of_adam(tmp_path):
    made = written(tmp_path, "rnn", optim={"name": "adadelta", "lr": 1e-4, "sched": None})
    found, _ = first(made, "schedule")
    assert (found.id, found.weight) == ("lr-too-low", "prevents")


def test_two_batches_of_twelve(tmp_path):
    found, _ = first(trial_left_over.make(tmp_path), "limits")
    assert (found.id, found.weight) == ("data-filtered", "warning")
    assert found.fix == ["take trainer.limit_train_batches out"]


@pytest.mark.parametrize("given,batches,said", [
    ({"fast_dev_run": True}, 12, True), ({"fast_dev_run": False}, 12, False), ({"overfit_batches": 0.0}, 12, False),
    ({"overfit_batches": 1}, None, True), ({"limit_train_batches": 1.0}, 12, False), ({"limit_train_batches": 0.1}, None, True),
    ({"limit_train_batches": 12}, 12, False), ({"limit_train_batches": 5000}, None, False),
    ({"limit_train_batches": 1000}, 100_000, True), ({"limit_train_batches": None}, 12, False),
])
def test_what_is_a_trial(given, batches, said):
    assert (left_from_a_trial(given, batches) is not None) is said


def test_a_loss_that_is_summed_with_a_rate_for_its_mean(tmp_path):
    made = written(tmp_path, "rnn", trainer={"gradient_clip_val": 0.0}, ctc_reduction="sum",
                   optim={"name": "sgd", "lr": 0.5, "sched": {"name": "CosineAnnealing", "warmup_steps": 50}})
    found, _ = first(made, "optimizer")
    assert (found.id, found.weight) == ("lr-too-high", "prevents") and found.evidence["of their size, in one step"] > 1


@pytest.mark.parametrize("until,weight", [(10_000, "prevents"), (-1, "prevents"), ([0, 700], "warning"), (50, None), ([200, 300], None)])
def test_modules_that_stay_frozen(tmp_path, until, weight):
    made = written(tmp_path, "rnn", freeze_updates={"enabled": True, "modules": {"encoder": until}})
    report = examine(**made, families=["limits"])
    assert [f.weight for f in report.findings if f.id == "frozen"] == ([weight] if weight else [])


@pytest.mark.parametrize("what,monitor,mode,wrong", [
    ("early stopping", "val_wer", "max", True), ("early stopping", "val_wer", "min", False), ("early stopping", "val_acc", "max", False),
    ("the best checkpoint", "val_loss", "max", True), ("the learning rate", "val_cer", None, False),
])
def test_what_is_watched(what, monitor, mode, wrong):
    found = turned_round(what, monitor, mode, "mode")
    assert (found is not None) is wrong
    assert not wrong or found.fix == ["mode=min"]


def test_the_worst_checkpoints_are_kept(tmp_path):
    config = {"name": "mine", "model": models.section("rnn"), "trainer": {"max_steps": 1000},
              "exp_manager": {"checkpoint_callback_params": {"monitor": "val_wer", "mode": "max"}}}
    report = examine(config=config, families=["limits"])
    assert [(f.where, f.weight) for f in report.findings if f.id == "monitor-reversed"] == [
        ("exp_manager.checkpoint_callback_params.mode", "warning")]


def test_callbacks_of_a_live_trainer():
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[
        EarlyStopping("val_wer", mode="max"), ModelCheckpoint(monitor="val_wer", mode="min")])
    assert [f.where for f in monitors_of(trainer)] == ["EarlyStopping(mode=...)"]


def test_a_run_that_was_stopped_while_it_got_better(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train_loss,val_wer\n" + "".join(
        f"{10 * e},{3 - 0.2 * e},{1.1 - 0.1 * e}\n" for e in range(1, 8)))
    (tmp_path / "lightning_logs.txt").write_text(
        "Monitored metric val_wer did not improve in the last 6 records. Best score: 1.000. Signaling Trainer to stop.\n")
    report = examine(run=tmp_path)
    assert report.findings[0].id == "monitor-reversed"
    assert "fallen to 0.4" in report.findings[0].symptom


def test_what_a_run_watched_is_in_its_checkpoint(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,train_loss,val_wer\n" + "".join(f"{3 * e},5.{9 - e},1.0\n" for e in range(1, 4)))
    callbacks = {"EarlyStopping{'monitor': 'val_wer', 'mode': 'max'}": {"wait_count": 2}}
    torch.save({"state_dict": {"w": torch.ones(2)}, "global_step": 9, "callbacks": callbacks}, tmp_path / "last.ckpt")
    found = examine(run=tmp_path).findings[0]
    assert (found.id, found.weight) == ("monitor-reversed", "prevents") and "EarlyStopping" in found.where


@pytest.mark.parametrize("changed", [{}, {"normalize": None}, {"window_stride": 0.0125}])
def test_weights_of_other_features(changed):
    own = {"normalize": "per_feature", "window_stride": 0.01, "dither": 1e-5}
    found = other_features({**own, "dither": 0.0, **changed}, own, "other.nemo")
    assert [f.id for f in found] == ["features-bad"] * bool(changed)
    assert not changed or found[0].fix == [f"model.preprocessor.{key}={own[key]}" for key in changed]


class Rectified(ConvASRDecoder):
    def forward(self, encoder_output):
        return self.decoder_layers(encoder_output).transpose(1, 2).relu().log_softmax(-1)


def test_scores_that_are_rectified(tmp_path):
    made = live(tmp_path, "rnn")
    before = examine(**made, families=["outputs"])
    assert "no-gradient" not in before.ids
    made["model"].decoder.__class__ = Rectified
    found = next(f for f in examine(**made, families=["outputs"]).findings if f.id == "no-gradient")
    assert found.evidence["share at the lowest"] > 0.2


@pytest.mark.parametrize("padded", ["in front", "behind"])
def test_padding_on_the_wrong_side(padded):
    seen = Delivered(["train.json"], 16000)
    for _ in range(6):
        lengths = torch.tensor([16000, 12000, 9000, 6000])
        audio = torch.zeros(4, 16000)
        for row, n in zip(audio, lengths.tolist()):
            (row[-n:] if padded == "in front" else row[:n]).normal_()
        seen.add((audio, lengths, torch.ones(4, 3), torch.full((4,), 3)), ["abc"] * 4)
    assert (seen.padded, seen.behind) == (18, 18 if padded == "in front" else 0)
    if padded == "in front":
        found, = seen.judge()
        assert (found.id, found.weight) == ("length-mismatch", "prevents")


def test_filters_that_end_below_speech(tmp_path):
    found, _ = first(filters_of_a_bass.make(tmp_path), "features")
    assert (found.id, found.weight) == ("features-bad", "warning") and "1000 to 2000 Hz" in found.symptom


def test_filters_that_begin_above_speech(tmp_path):
    found, _ = first(live(tmp_path, "rnn", preprocessor=models.preprocessor(lowfreq=4000)), "features")
    assert (found.id, found.weight) == ("features-bad", "prevents")


def test_filters_of_a_telephone(tmp_path):
    report = examine(**live(tmp_path, "rnn", preprocessor=models.preprocessor(lowfreq=200, highfreq=3600)), families=["features"])
    assert "features-bad" not in report.ids


def test_energies_without_logarithm_are_as_many_as_they_are(tmp_path):
    """Only loud frames show in them, whatever stretch is changed: it was taken for frames that are not heard."""
    report = examine(**live(tmp_path, "rnn", preprocessor=models.preprocessor(log=False)), families=["features"])
    assert "length-mismatch" not in report.ids and torch.is_grad_enabled()


def steps(rates, loss=2.9, every=3):
    trace = Trace(ended=True, loss_unit="character")
    for k, rate in enumerate(rates):
        trace.add("lr", k * every, rate)
        trace.add("loss", k * every, loss)
    return trace


@pytest.mark.parametrize("rates,low", [
    ([1e-3] * 4 + [1e-4] * 4 + [1e-5] * 4 + [1e-6] * 4, True),
    ([1e-3] * 16, False), ([1e-3] * 8 + [1e-4] * 8, False),  # one drop is no end
    ([1e-3 * (1 - k / 40) for k in range(40)], False),
])
def test_a_rate_that_is_cut_on_the_start_up_plateau(rates, low):
    found = [f for f in learning_rate(steps(rates)) if f.id == "lr-too-low"]
    assert bool(found) is low
    assert not low or "before the model had begun" in found[0].symptom


def test_a_rate_that_is_cut_when_the_model_has_learned():
    trace = steps([1e-3] * 12 + [1e-4] * 12 + [1e-5] * 12)
    trace.series["loss"] = []
    for k in range(36):
        trace.add("loss", 3 * k, max(3.0 - 0.2 * k, 0.2))
    assert not [f for f in learning_rate(trace) if f.id == "lr-too-low"]
