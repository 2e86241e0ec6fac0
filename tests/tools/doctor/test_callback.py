"""The callback on runs that go wrong and on runs that do not, of a plain LightningModule and of NeMo's own models.

The three histories of users are here in small: a ReLU recurrence that gives NaN whatever zero_infinity and clipping
do, a model that writes one letter, a Conformer that hardly converges.
"""

import json
import logging
import warnings

import pytest
import torch
from torch import nn

from tests.tools.doctor.runs import (
    BLANK, FEATURES, Plain, conformer_encoder, fit, loader, noam, speech, stock, tone_manifest, tones,
)
from tools.doctor.callback import Doctor
from tools.doctor.finding import Report
from tools.doctor.live import run_folder

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Recurrent(nn.Module):
    """A convolution and a bidirectional GRU: what learns the tones in some 60 steps."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.convolution = nn.Conv1d(FEATURES, width, 5, padding=2)
        self.gru = nn.GRU(width, width, bidirectional=True, batch_first=True)

    def forward(self, x):
        return self.gru(self.convolution(x.transpose(1, 2)).relu().transpose(1, 2))


class DeepSpeechAsWritten(nn.Module):
    """torchaudio's DeepSpeech in small: clipped dense layers around a ReLU recurrence that nothing bounds or
    normalises."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.fc = nn.ModuleList([nn.Linear(FEATURES, width), nn.Linear(width, width), nn.Linear(width, width)])
        self.bi_rnn = nn.RNN(width, width, nonlinearity="relu", bidirectional=True, batch_first=True)
        self.fc4 = nn.Linear(width, width)

    def forward(self, x):
        for layer in self.fc:
            x = layer(x).relu().clamp(max=20)
        both, _ = self.bi_rnn(x)
        width = both.shape[-1] // 2
        return self.fc4(both[..., :width] + both[..., width:]).relu().clamp(max=20)


def ids(report: Report, weight: str = "prevents") -> list[str]:
    return [finding.id for finding in report.findings if finding.weight == weight]


# ---- healthy ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("healthy")
    return folder, fit(Plain(Recurrent(), 64), loader(speech()), folder, 120)


def test_a_healthy_run_has_no_finding_and_leaves_its_report(healthy):
    folder, doctor = healthy
    report = doctor.report()
    assert report.findings == [] and report.exit_code == 0
    for fault in ("run-nan", "run-plateau", "run-collapse-blank", "lr-too-high", "lr-zero", "no-gradient",
        "infinite-loss-hidden"):
        assert fault in report.ruled_out
    saved = Report.from_dict(json.loads((folder / "doctor" / "report.json").read_text()))
    assert saved.findings == [] and any(line.startswith("cost:") for line in saved.examined)
    assert "<svg" not in (folder / "doctor" / "report.html").read_text()
    assert (folder / "doctor" / "curve.csv").read_text().startswith("step,")


def test_it_measures_what_the_frames_say(healthy):
    trace = healthy[1].trace
    assert trace.values("loss")[-1] < 0.5 < trace.level < 3.0
    assert 0.3 < trace.values("blank_rate")[-1] < 0.9  # a letter lasts 5 frames and takes one or more of them
    assert trace.values("letter_rate")[-1] < 0.5 and trace.values("labels_used")[-1] == BLANK
    assert abs(sum(trace.target_share.values()) - 1) < 1e-6 and len(trace.target_share) == BLANK
    assert trace.utterances_seen == 120 * 8 and trace.zero_infinity is True and trace.planned == 120


def test_the_level_is_the_loss_of_a_model_that_cannot_listen(tmp_path):
    """With its input cut off, the model learns the best constant output: its loss must come to the measured level."""

    class Deaf(Recurrent):
        def forward(self, x):
            return super().forward(torch.zeros_like(x))[0][:, :1].expand(-1, x.shape[1], -1)

    doctor = fit(Plain(Deaf(), 64, lr=1e-2), loader(speech()), tmp_path, 110, probe=False)
    late = doctor.trace.values("loss", since=0.8)
    assert abs(sum(late) / len(late) - doctor.trace.level) < 0.05 * doctor.trace.level
    assert doctor.trace.values("spread")[-1] < 1e-6


def test_nothing_that_is_learned_changes(tmp_path):
    """Bit for bit the same weights with and without it, dropout and the shuffle of the data included."""
    import lightning.pytorch as pl

    def weights(callbacks):
        pl.seed_everything(3, verbose=False)
        model = Plain(nn.Sequential(nn.Linear(FEATURES, 16), nn.Dropout(0.3), nn.ReLU()), 16)
        trainer = pl.Trainer(max_steps=25, accelerator="cpu", logger=False, enable_checkpointing=False,
                             enable_progress_bar=False, enable_model_summary=False, callbacks=callbacks)
        trainer.fit(model, loader(speech()[:64]))
        return model.state_dict()

    plain, watched = weights([]), weights([Doctor(folder=tmp_path, every_n_steps=1)])
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


def test_torch_is_put_back_after_the_run(healthy):
    from torch.nn import functional

    assert functional.ctc_loss.__module__ == "torch.nn.functional"


def test_a_report_is_not_put_into_the_folder_of_an_earlier_run(tmp_path):
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import CSVLogger
    from nemo.utils.app_state import AppState
    from nemo.utils.exp_manager import exp_manager

    before = getattr(AppState(), "log_dir", None)
    try:
        first, second = (Trainer(accelerator="cpu", logger=logger, enable_checkpointing=False, default_root_dir=tmp_path / "root")
                         for logger in (False, CSVLogger(tmp_path / "own")))
        exp_manager(first, {"explicit_log_dir": str(tmp_path / "first"), "create_checkpoint_callback": False})
        assert run_folder(first) == tmp_path / "first"
        assert run_folder(second) == tmp_path / "own" / "lightning_logs" / "version_0"
        second._loggers = []
        assert run_folder(second) == tmp_path / "root"
    finally:
        AppState().log_dir = before


def test_the_start_of_training_is_no_fault(tmp_path):
    report = fit(Plain(Recurrent(), 64), loader(speech()), tmp_path, 15).report()
    assert report.exit_code == 0 and ids(report, "note") == ["run-early"]
    assert "run-collapse-blank" not in report.ruled_out  # too early to say


def test_it_looks_less_often_where_looking_costs_more_than_its_share(tmp_path):
    doctor = fit(Plain(nn.Linear(FEATURES, 8), 8), loader(speech()), tmp_path, 40, every_n_steps=1, budget=1e-6,
        probe=False)
    assert doctor.pace.stride > 1


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="every_n_steps=0"):
        Doctor(every_n_steps=0)


# ---- history 1: NaN that zero_infinity and clipping do not cure ------------------------------------------------


@pytest.fixture(scope="module")
def exploded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exploded")
    torch.manual_seed(0)
    encoder = DeepSpeechAsWritten()
    with torch.no_grad():  # where training takes it: recurrent weights beyond the edge of stability
        for name, p in encoder.bi_rnn.named_parameters():
            if "weight_hh" in name:
                p.mul_(2.2)
    long = loader(tones(16, letters=160), batch=4)  # 800 frames
    return folder, fit(Plain(encoder, 32, lr=1e-2, zero_infinity=True), long, folder, 40, clip=1.0, stop=True)


def test_history_1_names_the_recurrence(exploded):
    folder, doctor = exploded
    report = doctor.report()
    first = report.findings[0]
    assert first.id == "explodes" and first.weight == "prevents" and first.confidence > 0.9
    assert first.where == "encoder.bi_rnn" and "800" not in first.symptom
    assert first.evidence["zero_infinity"] is True and first.evidence["log-probs are finite"] is False
    assert any(name.startswith("tone-") for name in first.evidence["utterances of that batch"])
    assert "run-nan" not in ids(report)
    saved = (folder / "doctor" / "report.html").read_text()
    assert "encoder.bi_rnn" in saved and "zero_infinity does not help" in saved and saved.count("<svg") >= 2


def test_history_1_shows_the_growth_over_time(exploded):
    frames, values = exploded[1].trace.bad.growth
    finite = [v for v in values if v == v and v != float("inf")]
    assert len(finite) > 10 and finite[-1] > 1e6 * finite[0]


def test_history_1_stops_the_run(exploded):
    assert exploded[1].trace.last_step < 40


# ---- history 2: one letter ------------------------------------------------------------------------------------


def test_history_2_upper_case_text_leaves_only_spaces(tmp_path):
    """NeMo drops every upper-case letter without a word; LibriSpeech's transcripts are upper-case."""
    manifest = tone_manifest(tmp_path / "data", upper=True)
    model = stock(manifest, conformer_encoder(), 32, {"name": "adamw", "lr": 2e-3})
    report = fit(model, None, tmp_path, 40, probe=False).report()
    assert report.findings[0].id == "data-upper-case" and "100%" in report.findings[0].symptom


def test_history_2_steps_that_are_too_large(tmp_path):
    doctor = fit(Plain(Recurrent(), 64, lr=0.5), loader(speech()), tmp_path, 120, probe=False)
    report = doctor.report()
    assert report.findings[0].id == "lr-too-high" and report.findings[0].weight == "prevents"
    assert "0.05" in report.findings[0].fix[0]
    assert not [f for f in report.findings if f.id.startswith("run-") and f.weight == "prevents"]


class OverTheBatch(nn.Module):
    """DeepSpeech2 in small, as somebody really wrote it: `batch_first=True` is forgotten, so the GRU runs over the
    batch."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.convolution = nn.Conv1d(16, width, 3, stride=4, padding=1)
        self.gru = nn.GRU(width, width // 2, bidirectional=True)

    def forward(self, audio_signal, length):
        x, _ = self.gru(self.convolution(audio_signal).relu().transpose(1, 2))
        return x.transpose(1, 2), (length - 1) // 4 + 1


def test_history_2_one_batch_by_heart_and_nothing_else(tmp_path):
    """Learns its batch, and on other utterances is wrong in all words: the probes at the end of the run say why."""
    train = tone_manifest(tmp_path / "train", count=8, seconds=0.16, context=True)
    held = tone_manifest(tmp_path / "held", count=8, seconds=0.16, context=True, seed=2)
    model = stock(train, conformer_encoder(), 32, {"name": "adamw", "lr": 5e-3}, validation=held)
    model.encoder = OverTheBatch()
    doctor = fit(model, None, tmp_path, 240)
    report = doctor.report(probes=True)
    assert doctor.trace.values("loss")[-1] < 0.3 and doctor.trace.values("val_wer")[-1] > 0.9
    assert report.findings[0].id == "batch-leak" and report.findings[0].weight == "prevents"
    by_heart = next(f for f in report.findings if f.id == "run-overfitting")
    assert by_heart.weight == "note" and "by heart" in by_heart.symptom and "batch-leak" in by_heart.symptom
    saved = Report.from_dict(json.loads((tmp_path / "doctor" / "report.json").read_text()))
    assert saved.findings[0].id == "batch-leak"


# ---- history 3: hardly converges ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return tone_manifest(tmp_path_factory.mktemp("tones"))


def test_history_3_a_warm_up_longer_than_the_run(manifest, tmp_path):
    """NeMo's Conformer YAML: a Noam warm-up of 10000 steps, made for a global batch of 2048."""
    slow = fit(stock(manifest, conformer_encoder(), 32, noam(32, 10000)), None, tmp_path / "slow", 102, probe=False)
    first = slow.report().findings[0]
    assert first.id == "warmup-too-long" and first.weight == "prevents" and "10000" in first.symptom
    assert first.fix[0].startswith("model.optim.sched.warmup_steps=10")
    mended = fit(stock(manifest, conformer_encoder(), 32, noam(32, 40, lr=0.5)), None, tmp_path / "mended", 102,
        probe=False)
    assert mended.report().exit_code == 0
    assert mended.trace.values("loss")[-1] < 0.5 < 2 < slow.trace.values("loss")[-1]


# ---- it must not end a run of itself ---------------------------------------------------------------------------


def test_a_fault_of_the_callback_switches_it_off_and_the_run_goes_on(tmp_path, monkeypatch):
    def fails(*arguments):
        raise ZeroDivisionError("made up")

    monkeypatch.setattr("tools.doctor.listen.spread", fails)
    doctor = fit(Plain(nn.Linear(FEATURES, 8), 8), loader(speech()), tmp_path, 12, probe=False)
    assert doctor._model.trainer.global_step == 12
    saved = Report.from_dict(json.loads((tmp_path / "doctor" / "report.json").read_text()))
    assert any("ZeroDivisionError in _after_batch: made up" in line for line in saved.not_examined)


# ---- one fault each -------------------------------------------------------------------------------------------


def test_a_module_of_a_stock_model_is_named_with_the_files_of_its_batch(manifest, tmp_path):
    class Overflows(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            y = self.inner(x)
            return y / (y.std() * 0)

    model = stock(manifest, conformer_encoder(), 32, {"name": "adamw", "lr": 2e-3})
    layer = model.encoder.layers[0].feed_forward2
    layer.linear2 = Overflows(layer.linear2)
    report = fit(model, None, tmp_path, 5, stop=True, probe=False).report()
    first = report.findings[0]
    assert first.id == "run-nan" and first.where == "encoder.layers.0.feed_forward2.linear2"
    names = first.evidence["utterances of that batch"]
    assert len(names) == 8 and all(name.startswith("tone-") for name in names)


def test_audio_that_is_not_finite_is_named(tmp_path):
    pairs = [(x.clone(), y) for x, y in tones(64)]
    pairs[5][0][3, 2] = float("nan")
    first = fit(Plain(Recurrent(), 64), loader(pairs), tmp_path, 20, probe=False).report().findings[0]
    assert first.id == "features-bad" and first.evidence["utterances of that batch"] == ["tone-5"]


def test_a_gradient_that_alone_is_not_finite_is_traced_to_its_module(tmp_path):
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(FEATURES, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.second(torch.sqrt(self.first(x * 0).square()))  # the slope of sqrt at 0 is infinite

    model = Plain(Root(), 16)
    nn.init.zeros_(model.encoder.first.bias)
    doctor = fit(model, loader(speech()), tmp_path, 3, probe=False)
    assert doctor.trace.bad.origin == "backward" and doctor.trace.bad.module == "encoder.first"
    assert "clipping does not help" in str(doctor.report().findings[0].evidence)


def test_infinite_losses_are_counted_and_named_though_they_are_zeroed(tmp_path):
    pairs = list(tones(56)) + tones(8, seed=1, frames=1,
        letters=12)  # 12 letters in 12 frames: no room between equal ones
    pairs = [(x, torch.full_like(y, 3) if len(x) == 12 else y) for x, y in pairs]
    doctor = fit(Plain(Recurrent(), 64), loader(pairs), tmp_path, 24, probe=False)
    found = next(f for f in doctor.report().findings if f.id == "infinite-loss-hidden")
    assert found.weight == "warning" and found.evidence["utterances"] == 8
    assert found.evidence["which"]["tone-60"] == "needs 23 frames, has 12"


def test_an_infinite_loss_that_is_not_zeroed_is_the_targets_fault(tmp_path):
    pairs = tones(64, frames=1)
    first = fit(Plain(Recurrent(), 64, zero_infinity=False), loader(pairs), tmp_path, 6,
        probe=False).report().findings[0]
    assert first.id == "data-target-too-long"


@pytest.mark.parametrize("lr, warmup, expected", [(0.0, 0, "lr-zero"), (1e-9, 0, "lr-too-low"),
    (3e-3, 10**6, "warmup-too-long")])
def test_rates_that_teach_nothing(tmp_path, lr, warmup, expected):
    report = fit(Plain(Recurrent(), 64, lr=lr, warmup=warmup), loader(speech()), tmp_path, 60, probe=False).report()
    assert ids(report) == [expected]


def test_parameters_that_no_optimizer_holds(tmp_path):
    model = Plain(Recurrent(), 64)
    model.configure_optimizers = lambda: torch.optim.Adam(model.output.parameters(), lr=3e-3)
    report = fit(model, loader(speech()), tmp_path, 5, probe=False).report()
    assert report.findings[0].id == "not-in-optimizer" and report.findings[0].weight == "prevents"


def test_a_detached_front_is_seen(tmp_path):
    class Detached(Recurrent):
        def forward(self, x):
            return self.gru(self.convolution(x.transpose(1, 2)).relu().transpose(1, 2).detach())

    report = fit(Plain(Detached(), 64), loader(speech()), tmp_path, 25, probe=False).report()
    found = next(f for f in report.findings if f.id == "no-gradient")
    assert found.evidence["parameters"] == ["encoder.convolution.weight", "encoder.convolution.bias"]


def test_a_schedule_stepped_per_epoch(tmp_path):
    model = Plain(Recurrent(), 64, warmup=500)
    wanted = model.configure_optimizers()
    wanted["lr_scheduler"]["interval"] = "epoch"
    model.configure_optimizers = lambda: wanted
    assert "schedule-per-epoch" in ids(fit(model, loader(speech()), tmp_path, 5, probe=False).report())


def test_slow_data(tmp_path):
    import time

    class Slow(list):
        def __getitem__(self, k):
            time.sleep(0.004)
            return super().__getitem__(k)

    named = Slow((x, y, f"tone-{k}") for k, (x, y) in enumerate(speech()[:64]))
    from tests.tools.doctor.runs import collate

    slow = torch.utils.data.DataLoader(named, batch_size=8, collate_fn=collate)
    report = fit(Plain(nn.Linear(FEATURES, 8), 8), slow, tmp_path, 60, probe=False).report()
    assert "data-slow" in ids(report, "warning")


def test_a_late_collapse_is_told_from_a_plateau(tmp_path):
    """Learned, then the rate rises a hundredfold: diverged, and by what."""
    model = Plain(Recurrent(), 64, lr=5e-3)
    plain = model.configure_optimizers

    def schedule():
        optimizer = plain()
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 100 else 200.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}

    model.configure_optimizers = schedule
    report = fit(model, loader(speech()), tmp_path, 170, clip=None, probe=False).report()
    assert report.findings[0].id == "lr-too-high", report.ids
    lost = next(f for f in report.findings if f.id in ("run-diverged", "run-collapse-letter", "run-collapse-blank"))
    assert lost.weight == "note" and 80 <= lost.evidence["at step"] <= 105


# ---- metrics that lie -----------------------------------------------------------------------------------------


class Scored(Plain):
    """Validation with a WER that is right, averaged over batches, or of texts that were not collapsed."""

    way = "right"

    def validation_step(self, batch, batch_idx):
        from tools.doctor.metrics import collapse, word_errors

        loss, log_probs, lengths = self.compute(batch)
        errors = words = 0
        for best, length, target, size in zip(log_probs.argmax(-1).tolist(), lengths.tolist(), batch[2].tolist(),
            batch[3].tolist()):
            heard = collapse(best[:length], BLANK, repeats=self.way != "repeats")
            texts = ["".join(self.labels[i] for i in ids) for ids in (target[:size], heard)]
            errors += word_errors(*(text.split() for text in texts))
            words += len(texts[0].split())
        self.kept.append((errors, words))

    def on_validation_epoch_start(self):
        self.kept = []

    def on_validation_epoch_end(self):
        if self.way == "averaged":
            rate = sum(e / max(w, 1) for e, w in self.kept) / len(self.kept)
        else:
            rate = sum(e for e, _ in self.kept) / sum(w for _, w in self.kept)
        self.log("val_wer", rate)


@pytest.mark.parametrize("way, expected", [("right", None), ("averaged", "metric-averaged"),
    ("repeats", "metric-not-collapsed")])
def test_the_reported_wer_is_counted_anew(tmp_path, way, expected):
    long = tones(8, seed=10, letters=60)  # a batch that is long and hard beside three that are short and easy
    held = tones(24, seed=9) + [(x + 1.5 * torch.randn_like(x), y) for x, y in long]
    model = Scored(Recurrent(), 64)
    model.way = way
    doctor = fit(model, loader(speech()), tmp_path, 100, validation=loader(held, batch=8, shuffle=False), probe=False)
    report = doctor.report()
    assert [f.id for f in report.findings if f.id.startswith("metric-")] == ([expected] if expected else [])
    if expected is None:
        assert any("counted anew" in line for line in report.examined)
