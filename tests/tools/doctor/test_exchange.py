"""Exchange of parts: one batch is learned, or it is said in which part the fault lies."""

import copy
from dataclasses import replace

import pytest
import torch
from nemo.collections.asr.models import EncDecCTCModel
from nemo.collections.asr.modules import AudioToMelSpectrogramPreprocessor, ConvASRDecoder
from torch import nn

from tests.tools.doctor.setups import models, tones
from tests.tools.doctor.setups.encoders import SpeechRNN
from tools.doctor import exchange
from tools.doctor.causes import name_causes
from tools.doctor.engine import examine
from tools.doctor.finding import Finding


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return tones.manifests(tmp_path_factory.mktemp("tones"), count=16)


def built(given, cls=EncDecCTCModel):
    return models.build(models.section("rnn", given), cls=cls)


def examined(model, given, **more):
    return examine(model=model, manifests={"train": given["train"][0]}, **{"families": ["exchange"], **more})


def becomes(module: nn.Module, cls):
    """The module with another class's methods."""
    module.__class__ = cls
    return module


class Deaf(SpeechRNN):
    """Hears the whole batch at once, in all frames alike."""

    def encode(self, x, length):
        return super().encode(x.mean(dim=(0, 1, 2), keepdim=True).expand_as(x).contiguous(), length)


class Noise(AudioToMelSpectrogramPreprocessor):
    """Features that have nothing to do with the audio."""

    def forward(self, input_signal, length):
        x, frames = super().forward(input_signal=input_signal, length=length)
        return torch.randn_like(x), frames


class Shut(ConvASRDecoder):
    """Lets nothing of the encoder through."""

    def forward(self, encoder_output):
        return super().forward(encoder_output=encoder_output * 0.0)


class Wrong(EncDecCTCModel):
    """Learns another utterance's text at each step."""

    def training_step(self, batch, batch_idx):
        audio, lengths, targets, sizes = batch
        order = torch.randperm(len(audio))
        return super().training_step((audio, lengths, targets[order], sizes[order]), batch_idx)


class LearnsOnce(EncDecCTCModel):
    """By hand, backward pass and all."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)["loss"]
        self.manual_backward(loss)
        return loss.detach()


@pytest.mark.parametrize("cls", [EncDecCTCModel, LearnsOnce])
def test_a_batch_that_is_learned_is_no_finding_and_nothing_has_changed(given, cls):
    model = built(given, cls)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    report = examined(model, given)
    assert report.findings == [] and report.ruled_out == ["batch-not-learned"], report
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("part, spoil", [
    ("encoder", lambda model: becomes(model.encoder, Deaf)),
    ("features", lambda model: becomes(model.preprocessor, Noise)),
    ("decoder", lambda model: becomes(model.decoder, Shut)),
    ("step", lambda model: None),
])
def test_the_part_that_is_at_fault_is_named(given, part, spoil):
    model = built(given, Wrong if part == "step" else EncDecCTCModel)  # NeMo wraps training_step when it is built
    spoil(model)
    report = examined(model, given)
    assert [(f.id, f.where) for f in report.findings] == [("batch-not-learned", part)], report.findings
    finding = report.findings[0]
    assert f"in place of {exchange.NAMES[part]} it is, after" in finding.symptom
    assert finding.fix == exchange.FIXES[part]


@pytest.mark.parametrize("where, id, told", [("step", "loss-wrong", True), ("encoder", "loss-wrong", False),
                                             ("encoder", "vanishes", True)])
def test_a_warning_about_that_part_becomes_the_cause(where, id, told):
    batch = Finding("batch-not-learned", "prevents", "It is not learned.", "y", {}, [], 0.6, where=where)
    warning = Finding(id, "warning", "x", "y", {}, [], 0.8)
    found = {f.id: f for f in name_causes([batch, warning])}
    assert (found[id].weight, found["batch-not-learned"].weight) == (("prevents", "note") if told else ("warning", "prevents"))
    unsure = {f.id: f.weight for f in name_causes([batch, replace(warning, confidence=0.3)])}
    assert unsure == {"batch-not-learned": "prevents", id: "warning"}


def test_two_faults_are_not_put_down_to_one(given):
    model = built(given)
    becomes(model.encoder, Deaf)
    becomes(model.preprocessor, Noise)
    finding, = examined(model, given).findings
    assert "no single exchange does" in finding.symptom and finding.weight == "warning"


def test_time_that_does_not_suffice_is_said(given):
    report = examined(built(given), given, seconds=0.5)
    assert report.findings == [] and "--only exchange --seconds" in report.not_examined[-1]
    assert "batch-not-learned" not in report.ruled_out


def test_check_exchanges_only_where_nothing_else_prevents_learning(given, monkeypatch):
    called = []
    monkeypatch.setattr(exchange.Bench, "train", lambda *args, **more: called.append(args) or exchange.Trial(10, 0.1))
    report = examined(built(given), given, families=None)
    assert called and "batch-not-learned" in report.ruled_out
    called.clear()
    model = built(given)
    model.encoder.requires_grad_(False)
    report = examined(model, given, families=None)
    assert report.of_weight("prevents") and not called and "batch-not-learned" not in report.ruled_out
