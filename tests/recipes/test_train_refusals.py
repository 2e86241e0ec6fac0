"""What a training cannot work with, data or settings, is one line on stderr and exit status 2: no traceback."""

import json

import numpy as np
import pytest
import soundfile
import torch

from recipes.config import compose
from recipes.train import EXIT_CONFIG, _guarded_fit, _one_line
from tests.recipes.test_train import TINY
from tests.recipes.test_train import corpus as tones  # noqa: F401  a fixture

SETTINGS = [setting for setting in TINY[2:] if not setting.startswith("trainer.max_steps")]


def refusal(capsys, folder, *overrides: str) -> str:
    cfg = compose("deepspeech2", [*SETTINGS, "trainer.max_steps=9", f"exp_manager.explicit_log_dir={folder}/exp", *overrides])
    assert _guarded_fit(cfg) == EXIT_CONFIG
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if line.startswith("train.py: ")]
    assert len(said) == 1 and not any("Traceback" in line for line in lines)
    return said[0]


def written(tones, folder, which: int, change) -> list[str]:
    """The overrides of the corpus with `change` (of the list of rows) made to its train (0) or dev (1) manifest."""
    key, path = tones[which].split("=")
    rows = [json.loads(line) for line in open(path)]
    lines = change(rows, folder) or [json.dumps(row) for row in rows]
    (folder / "changed.json").write_text("\n".join(lines) + "\n")
    return [f"{key}={folder}/changed.json", tones[1 - which]]


def set_row(number: int, **fields):
    return lambda rows, folder: rows[number].update(fields)


def stereo(rows, folder):
    soundfile.write(folder / "stereo.wav", np.zeros((16000, 2), dtype="float32"), 16000)
    rows[2].update(audio_filepath=str(folder / "stereo.wav"), duration=1.0)


def without_text(rows, folder):
    del rows[3]["text"]


def cut_off(rows, folder):
    return [json.dumps(rows[0]), json.dumps(rows[1])[:40]]


@pytest.mark.parametrize(
    "which, change, words",
    [
        (0, without_text, ["changed.json:4:", "no 'text' field"]),
        (0, cut_off, ["changed.json:2:", "not JSON"]),
        (0, set_row(5, text="abc, de"), ["changed.json:6:", "[',']", "not among the labels"]),
        (0, set_row(5, text="ABC"), ["changed.json:6:", "lower-case the text"]),
        (0, lambda rows, folder: [row.update(text="") for row in rows] and None, ["all texts are empty"]),
        (0, lambda rows, folder: [row.update(duration=99.0) for row in rows] and None, ["none of 24", "max_duration"]),
        (0, stereo, ["utterance u2 cannot be trained on", "2 channels"]),
        (0, set_row(2, audio_filepath="/nowhere/u2.flac"), ["utterance u2 cannot be trained on", "/nowhere/u2.flac"]),
        (1, set_row(1, text="ABC"), ["utterance u1 cannot be validated on", "lower-case the text"]),
        (1, set_row(1, audio_filepath="/nowhere/u1.flac"), ["/nowhere/u1.flac", "cannot be read"]),
        (1, without_text, ["changed.json:4:", "no 'text' field"]),
    ],
)
def test_data_that_cannot_be_used_is_named(tones, which, change, words, tmp_path, capsys):  # noqa: F811
    said = refusal(capsys, tmp_path, *written(tones, tmp_path, which, change))
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    "override, words",
    [
        ("model.encoder.rnn_type=foo", ["rnn_type='foo'", "gru"]),
        ("model.ctc_reduction=sum", ["ctc_reduction", "mean_volume"]),
        ("trainer.precision=fp16", ["fp16", "bf16-mixed"]),
        ("exp_manager.explicit_log_dir=/proc/nowhere", ["/proc/nowhere"]),
    ],
)
def test_settings_that_cannot_be_built_are_one_line(tones, override, words, tmp_path, capsys):  # noqa: F811
    said = refusal(capsys, tmp_path, *tones, override)
    assert all(word in said for word in words), said


def test_weights_that_cannot_be_read_are_one_line(tones, tmp_path, capsys):  # noqa: F811
    (tmp_path / "broken.nemo").write_text("no archive")
    said = refusal(capsys, tmp_path, *tones, f"init_from={tmp_path}/broken.nemo")
    assert "broken.nemo" in said


def test_a_gpu_that_is_not_there_is_one_line(tones, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "1 GPU(s) asked for" in refusal(capsys, tmp_path, *tones, "trainer=gpu")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"),
                                   torch.AcceleratorError("CUDA error: out of memory", 2),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")])
def test_too_little_memory_is_one_line_with_what_helps(tones, tmp_path, capsys, monkeypatch, error):  # noqa: F811
    def fit(cfg):
        cfg.model.train_ds.batch_duration = 240.0
        raise error

    monkeypatch.setattr("recipes.train.fit", fit)
    said = refusal(capsys, tmp_path, *tones, "trainer.accumulate_grad_batches=2")
    assert "240 s of audio" in said and "trainer.accumulate_grad_batches=4 (now 2)" in said
    monkeypatch.setattr("recipes.train.fit", lambda cfg: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        refusal(capsys, tmp_path, *tones)


def test_the_traceback_is_there_for_who_wants_it(tones, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="no 'text' field"):
        refusal(None, tmp_path, *written(tones, tmp_path, 0, without_text))


def test_what_a_worker_passes_on_is_its_last_line():
    passed_on = RuntimeError("Caught RuntimeError in worker 0.\nTraceback (most recent call last):\n  x\nRuntimeError: u1: cut")
    assert _one_line(passed_on) == "u1: cut"
