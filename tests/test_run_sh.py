"""run.sh as a user meets it: its help, its refusals, stages that are skipped when complete, and the whole on real speech."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

TINY = [
    "model.encoder.conv_channels=[4,4]", "model.encoder.rnn_layers=1", "model.encoder.rnn_hidden=48", "trainer.max_steps=6",
    "model.optim.lr=5e-3", "model.train_ds.num_workers=0",
]


def run(*arguments, cwd=ROOT, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(["./run.sh", *arguments], cwd=cwd, capture_output=True, text=True, timeout=900,
                          env={**os.environ, **environment})


def test_help_lists_options_and_stages():
    done = run("--help")
    assert done.returncode == 0
    for word in ("--model", "--corpus", "--data", "--exp", "--gpus", "--nodes", "--stage", "--stop-stage", "--force",
                 "deepspeech2", "conformer_bpe", "librispeech_8h", "0 corpus", "7 report", "./run.sh test"):
        assert word in done.stdout


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--modell", "x"], ["--modell", "--model"]),
        (["--model", "deepspeech3"], ["deepspeech3", "deepspeech2", "conformer_bpe"]),
        (["--corpus", "ted"], ["ted", "librispeech_960h"]),
        (["--stage", "9"], ["--stage 9"]),
        (["--stop-stage", "x"], ["--stop-stage x"]),
        (["--gpus", "two"], ["--gpus two"]),
        (["--nodes", "0"], ["--nodes 0"]),
        (["--nodes", "2", "--gpus", "0"], ["--nodes 2", "--gpus N"]),
        (["--model"], ["--model needs a value"]),
    ],
)
def test_what_cannot_be_is_one_line_with_the_valid_ones(arguments, words):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


def test_no_suitable_python_is_said_in_one_line(tmp_path):
    for name in ("run.sh", "requirements.lock", "requirements-torch.txt"):
        shutil.copy(ROOT / name, tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "cat", "cksum", "env"):
        (tools / name).symlink_to(shutil.which(name))
    done = run(cwd=tmp_path, PATH=str(tools))
    assert done.returncode == 2
    assert "no Python 3.10, 3.11 or 3.12 found" in done.stderr and not (tmp_path / ".venv").exists()


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The project's files in a folder of their own, with this environment: data/ and exp/ of the real one stay untouched."""
    target = tmp_path / "checkout"
    target.mkdir()
    for name in ("recipes", "manifests", "tools", "conf"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run.sh", "requirements.lock", "requirements-torch.txt"):
        shutil.copy(ROOT / name, target)
    if not (ROOT / ".venv" / ".installed").is_file():
        pytest.skip("the environment was not made by run.sh")
    (target / ".venv").symlink_to(ROOT / ".venv")
    return target


def test_all_stages_on_real_speech_then_nothing_to_do(checkout, librispeech_sample):
    """The whole pipeline on 83 real utterances: short training, every stage, then every stage skipped."""
    arguments = ["--corpus", "librispeech_8h", "--data", str(librispeech_sample), "--gpus", "0", "--", *TINY]
    done = run(*arguments, cwd=checkout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = checkout / "exp" / "deepspeech2_librispeech_8h"
    assert "83 of the 2344 utterances" in done.stdout and "held out" in done.stdout
    assert json.loads((folder / "check" / "one_batch.json").read_text())["batch"]["wer"] == 0
    metrics = json.loads((folder / "evaluation" / "metrics.json").read_text())
    assert [one["name"] for one in metrics["manifests"]] == ["dev", "eval"]
    assert metrics["overall"]["utterances"] == 28 and metrics["overall"]["wer"] > 0
    for name in ("deepspeech2.nemo", "curve.csv", "curve.png", "report.md", "average.json", "config.yaml"):
        assert (folder / name).stat().st_size > 0
    assert "| dev |" in done.stdout
    again = run(*arguments, cwd=checkout)
    assert again.returncode == 0
    assert again.stdout.count("complete, skipped") == 7, again.stdout
    # What a stage reads has changed: it and what follows are done again, the rest is not.
    os.utime(folder / "deepspeech2.nemo")
    third = run(*arguments, cwd=checkout)
    assert "stage 4: train: complete, skipped" in third.stdout and "== stage 6: evaluate: exp" in third.stdout
