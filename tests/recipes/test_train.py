"""Whole trainings of a tiny model in processes of their own: they end, resume where they were cut, and agree.

Without dropout, SpecAugment and dither a run is reproducible, so "resumes exactly" and "two processes learn what one
does" can be asserted on the losses of single steps.
"""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.conftest import ROOT

STEPS = 24
TINY = [
    "--config-name", "deepspeech2",
    "model.encoder.conv_channels=[4,4]", "model.encoder.rnn_layers=1", "model.encoder.rnn_hidden=24",
    "model.encoder.conv_norm=layer", "model.encoder.dropout=0.05", "model.preprocessor.dither=0",
    "model.preprocessor.features=20", f"trainer.max_steps={STEPS}", "trainer.log_every_n_steps=1", "logger=csv",
    "corpus.bucket_duration_bins=[2.0]", "training.global_batch_seconds=8", "model.train_ds.num_workers=0",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[str]:
    """24 utterances of tones, one frequency a letter: quick to make and learnable in principle."""
    folder = tmp_path_factory.mktemp("tones")
    generator = np.random.default_rng(0)
    rows = []
    for i in range(24):
        text = "".join(generator.choice(list("abcde"), size=5 + i % 7))
        t = np.arange(2400) / 16000
        audio = np.concatenate([np.sin(2 * np.pi * 300 * (1 + "abcde".index(c)) * t) for c in text])
        audio = 0.3 * audio + 0.01 * generator.standard_normal(len(audio))
        soundfile.write(folder / f"u{i}.flac", audio.astype("float32"), 16000)
        rows.append({"audio_filepath": str(folder / f"u{i}.flac"), "duration": len(audio) / 16000, "sampling_rate": 16000,
                     "text": text, "utterance": f"u{i}"})
    for name, part in (("train", rows), ("dev", rows[:4])):
        (folder / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in part))
    return [f"corpus.train={folder}/train.json", f"corpus.validation={folder}/dev.json"]


def command(corpus, folder, *more) -> list[str]:
    return [sys.executable, "recipes/train.py", *TINY, *corpus, f"exp_manager.explicit_log_dir={folder}", *more]


def train(corpus, folder, *more, expect=0) -> str:
    done = subprocess.run(command(corpus, folder, *more), cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == expect, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def losses(folder) -> dict[int, float]:
    with open(Path(folder) / "curve.csv", newline="") as file:
        return {int(row["step"]): float(row["loss"]) for row in csv.DictReader(file) if row["loss"]}


def interrupt(corpus, folder, signum, after: int, *more) -> int:
    """Starts a run, sends the signal once curve.csv shows step `after`, and returns the exit status."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command(corpus, folder, *more), cwd=ROOT, **quiet)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        time.sleep(0.05)
        assert process.poll() is None, "the run ended before it was interrupted"
        if (Path(folder) / "curve.csv").is_file() and max(losses(folder), default=0) >= after:
            break
    os.kill(process.pid, signum)
    return process.wait(timeout=120)


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> dict[int, float]:
    """Step to loss of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    train(corpus, folder)
    return losses(folder)


def test_a_run_learns_and_leaves_its_files(corpus, whole, tmp_path_factory):
    assert list(whole) == list(range(1, STEPS + 1))
    assert np.mean([whole[step] for step in range(STEPS - 3, STEPS + 1)]) < 0.7 * np.mean([whole[s] for s in (1, 2, 3)])


def test_sigterm_saves_and_the_same_command_goes_on_exactly(corpus, whole, tmp_path):
    slow = "training.validations=1"
    status = interrupt(corpus, tmp_path, signal.SIGTERM, 8, slow)
    assert status == 143
    reached = max(losses(tmp_path))
    assert reached < STEPS
    output = train(corpus, tmp_path, slow)
    resumed = int(re.search(r"resumed at step (\d+)", output)[1])
    assert resumed >= reached - 1 and resumed < STEPS
    after = losses(tmp_path)
    assert list(after) == list(range(1, STEPS + 1))  # no step is missing, none stands twice
    # The same batch, weights, moments and learning rate at each step: the same loss.
    np.testing.assert_allclose([after[s] for s in after], [whole[s] for s in after], rtol=2e-3)


def test_kill_9_loses_only_what_came_after_the_last_checkpoint(corpus, whole, tmp_path):
    every = ["trainer.val_check_interval=4"]
    status = interrupt(corpus, tmp_path, signal.SIGKILL, 10, *every)
    assert status == -signal.SIGKILL
    output = train(corpus, tmp_path, *every)
    assert int(re.search(r"resumed at step (\d+)", output)[1]) in (4, 8, 12, 16, 20)
    after = losses(tmp_path)
    np.testing.assert_allclose([after[s] for s in range(1, STEPS + 1)], [whole[s] for s in range(1, STEPS + 1)], rtol=2e-3)
    assert not list(Path(tmp_path, "checkpoints").glob("*unfinished*"))


def test_a_complete_run_is_not_trained_again(corpus, tmp_path):
    train(corpus, tmp_path, "trainer.max_steps=4")
    before = (tmp_path / "curve.csv").read_text()
    (tmp_path / "deepspeech2.nemo").write_text("weights")
    output = train(corpus, tmp_path, "trainer.max_steps=4")
    assert (tmp_path / "curve.csv").read_text() == before and (tmp_path / "deepspeech2.nemo").is_file()
    assert "training is complete: step 4 of 4" in output
    output = train(corpus, tmp_path, "trainer.max_steps=4", "model.optim.lr=1e-3", expect=2)
    assert "holds a run with other settings: model.optim.lr was 0.004, now 0.001" in output

    output = train(corpus, tmp_path, "trainer.max_steps=8", "resume_with_changes=true", "training.warmup_share=0.01")
    assert "resumed at step 4 of 8" in output and (tmp_path / "deepspeech2.nemo").is_file()
    with open(tmp_path / "curve.csv", newline="") as file:
        rates = {int(row["step"]): float(row["learning_rate"]) for row in csv.DictReader(file) if row["learning_rate"]}
    assert rates[4] < 0.1 * rates[5] and rates[5] > rates[8]  # the plan of eight steps, not that of four at its end


def test_several_batches_make_a_step(corpus, whole, tmp_path):
    rows = [json.loads(line) for line in open(corpus[0].split("=")[1])]
    audio, rate = soundfile.read(rows[3]["audio_filepath"], dtype="float32")
    audio[100] = np.nan
    soundfile.write(tmp_path / "broken.wav", audio, rate, subtype="FLOAT")
    rows[3] |= {"audio_filepath": str(tmp_path / "broken.wav"), "utterance": "broken-one"}
    (tmp_path / "train.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train([f"corpus.train={tmp_path}/train.json", corpus[1]], tmp_path / "exp", "trainer.accumulate_grad_batches=2",
          "model.encoder.conv_norm=batch", "training.validations=4")
    with open(tmp_path / "exp" / "curve.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    validated = [int(row["step"]) for row in rows if row["val_wer"]]
    assert [int(row["step"]) for row in rows if row["loss"]] == list(range(1, STEPS + 1))  # a row a step
    assert 4 <= len(validated) <= 5 and validated[-1] == STEPS
    assert all(np.isfinite(float(row["val_loss"])) for row in rows if row["val_wer"])  # statistics without NaN
    one, two = ([run[s] for s in range(STEPS - 5, STEPS + 1)] for run in (whole, losses(tmp_path / "exp")))
    assert np.nanmean(two) < 1.5 * np.mean(one)


def test_two_gloo_processes_agree_with_one_at_the_same_global_batch(corpus, whole, tmp_path):
    two = ["trainer=cpu_ddp", "trainer.precision=32"]
    train(corpus, tmp_path, *two, "trainer.max_steps=12", f"training.warmup_share={0.1 * STEPS / 12}")
    assert sorted(losses(tmp_path)) == list(range(1, 13))
    # Half the batch each: other batches, the same data, the same schedule at the start. Compared over a pass.
    one, both = ([run[s] for s in range(1, 9)] for run in (whole, losses(tmp_path)))
    assert abs(np.mean(one) - np.mean(both)) < 0.25 * np.mean(one)
    output = train(corpus, tmp_path, *two, "trainer.max_steps=16", f"training.warmup_share={0.1 * STEPS / 12}",
                   "resume_with_changes=true")
    assert "resumed at step 12 of 16" in output and max(losses(tmp_path)) == 16


def test_a_batch_with_nan_audio_is_named_and_skipped(corpus, tmp_path):
    rows = [json.loads(line) for line in open(corpus[0].split("=")[1])]
    audio, rate = soundfile.read(rows[3]["audio_filepath"], dtype="float32")
    audio[100] = np.nan
    soundfile.write(tmp_path / "broken.wav", audio, rate, subtype="FLOAT")
    rows[3] |= {"audio_filepath": str(tmp_path / "broken.wav"), "utterance": "broken-one"}
    (tmp_path / "train.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = train([f"corpus.train={tmp_path}/train.json", corpus[1]], tmp_path / "exp", "model.encoder.conv_norm=batch")
    assert re.search(r"batch skipped.*not finite in \['broken-one'\]", output), output[-3000:]
    clean = [loss for loss in losses(tmp_path / "exp").values() if np.isfinite(loss)]
    assert STEPS // 2 < len(clean) < STEPS and clean[-1] < clean[0]


def test_targets_that_do_not_fit_are_named_once(corpus, tmp_path):
    rows = [json.loads(line) for line in open(corpus[0].split("=")[1])]
    rows[5] |= {"text": "abcde" * 30, "utterance": "too-long"}
    (tmp_path / "train.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = train([f"corpus.train={tmp_path}/train.json", corpus[1]], tmp_path / "exp")
    assert len(re.findall(r"utterance too-long: CTC loss is infinite, 150 targets", output)) == 1


def test_a_run_that_only_gives_nan_stops_and_says_why(corpus, tmp_path):
    output = train(corpus, tmp_path, "model.optim.lr=1e30", "training.warmup_share=0", "trainer.gradient_clip_val=0", expect=3)
    assert "the run stops" in output and "Lower model.optim.lr" in output
