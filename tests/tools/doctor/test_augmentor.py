"""NeMo's augmentor: what of the speech is left after it."""

import json
import random

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import soundfile

from tests.tools.doctor.faults import shift_of_three_seconds
from tests.tools.doctor.setups import live, models, tones
from tools.doctor.augmentor import compared, way_lost
from tools.doctor.engine import examine

CHECK = "features: The augmentation of waveforms leaves the speech where it is, and audible"
SPOKEN = tones.speak("the time that it has been so long away", 1)


def given(folder, augmentor, **more):
    train = models.datasets(tones.manifests(folder))["train_ds"]
    return live(folder, "rnn", train_ds={**train, "augmentor": augmentor, **more})


def found(folder, augmentor, **more):
    report = examine(**given(folder, augmentor, **more), families=["features"])
    return [f for f in report.findings if f.id == "augmentation-too-strong"], report


@pytest.mark.parametrize("augmentor, kind", [
    ({"shift": {"prob": 1.0, "min_shift_ms": -3000, "max_shift_ms": 3000}}, "out of the window"),
    ({"white_noise": {"prob": 1.0, "min_level": -5, "max_level": 0}}, "not heard any more"),
    ({"gain": {"prob": 1.0}, "shift": {"prob": 0.9, "min_shift_ms": -3000, "max_shift_ms": 3000}}, "out of the window"),
])
def test_speech_is_lost(tmp_path, augmentor, kind):
    [finding], report = found(tmp_path, augmentor)
    assert finding.weight == "prevents" and kind in finding.symptom and report.exit_code == 1
    name = list(augmentor)[-1]
    assert finding.where == f"model.train_ds.augmentor.{name}"
    assert finding.fix[0].startswith(f"{finding.where}.prob=0.0")


def test_half_of_the_draws_are_a_warning(tmp_path):
    [finding], report = found(tmp_path, {"shift": {"prob": 0.5, "min_shift_ms": -3000, "max_shift_ms": 3000}})
    assert finding.weight == "warning" and 0.25 <= finding.evidence["share of draws lost"] <= 0.6


def room(folder):
    """A manifest of one impulse response of 0.3 s."""
    t = np.arange(4800) / 16000
    sound = 0.3 * np.random.default_rng(0).standard_normal(len(t)) * 10 ** (-10 * t)
    sound[0] = 1.0
    soundfile.write(folder / "room.wav", sound / 2, 16000)
    row = {"audio_filepath": str(folder / "room.wav"), "duration": 0.3, "text": "", "offset": 0}
    (folder / "rooms.json").write_text(json.dumps(row) + "\n")
    return str(folder / "rooms.json")


@pytest.mark.parametrize("augmentor", [
    {"shift": {"prob": 1.0, "min_shift_ms": -5.0, "max_shift_ms": 5.0}},
    {"white_noise": {"prob": 1.0, "min_level": -90, "max_level": -46}},
    {"gain": {"prob": 1.0, "min_gain_dbfs": -6, "max_gain_dbfs": 6}},
    {"speed": {"prob": 1.0, "sr": 16000, "resample_type": "fft", "min_speed_rate": 0.9, "max_speed_rate": 1.1}},
    {"time_stretch": {"prob": 1.0, "min_speed_rate": 0.9, "max_speed_rate": 1.1}},
    {"silence": {"prob": 1.0, "max_start_silence_secs": 1.0, "max_end_silence_secs": 1.0}},
    {"impulse": {"prob": 1.0, "manifest_path": room}},
    {"gain": {"prob": 1.0}, "shift": {"prob": 1.0}, "white_noise": {"prob": 1.0},
     "speed": {"prob": 1.0, "sr": 16000, "resample_type": "fft"}},
    {}, None,
])
def test_what_recipes_do_raises_nothing(tmp_path, augmentor):
    augmentor = augmentor and {name: {k: v(tmp_path) if callable(v) else v for k, v in own.items()}
                               for name, own in augmentor.items()}
    findings, report = found(tmp_path, augmentor)
    assert findings == [] and CHECK in report.examined, report.not_examined


@pytest.mark.parametrize("augmentor, more, why", [
    ({"noise": {"prob": 0.5, "manifest_path": "/nowhere/noise.json"}}, {}, "/nowhere/noise.json"),
    ({"gain": {"min_gain_dbfs": -6}}, {}, "prob"), ({"gain": 1}, {}, "names and their settings"),
    ({"shift": {"prob": 1.0}}, {"use_lhotse": True}, "lhotse"),
])
def test_what_cannot_be_made_is_said(tmp_path, augmentor, more, why):
    findings, report = found(tmp_path, augmentor, **more)
    assert findings == [] and any(line.startswith(CHECK) and why in line for line in report.not_examined)


def test_random_state_stays(tmp_path):
    made = given(tmp_path, {"shift": {"prob": 0.5, "rng": 3}, "white_noise": {"prob": 1.0, "rng": 4}})
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    examine(**made, families=["features"])
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def lost(after):
    return way_lost(*compared(SPOKEN, np.asarray(after, dtype=np.float32), 16000))


def test_ways_to_lose_speech():
    count = len(SPOKEN)
    assert lost(SPOKEN[: count * 3 // 4]) == lost(SPOKEN[count // 4:]) == lost(0 * SPOKEN) == "out of the window"
    assert lost(np.full(count, np.nan)) == lost(SPOKEN[:100]) == "out of the window"
    assert lost(np.where(np.arange(count) % (count // 4) < count // 8, 0, SPOKEN)) == "cut out"
    assert lost(np.random.default_rng(0).standard_normal(count)) == "not heard any more"
    for kept in (SPOKEN, -SPOKEN, 0.01 * SPOKEN, np.pad(SPOKEN, (8000, 3000)), SPOKEN[: count * 19 // 20]):
        assert lost(kept) is None


def test_the_configuration_alone_is_enough(tmp_path):
    report = examine(**shift_of_three_seconds.make(tmp_path), families=["features"])
    assert report.ids[0] == "augmentation-too-strong" and report.exit_code == 1
