"""run.sh as a user meets it: its help, its refusals, stages that are skipped when complete, and the whole on real speech."""

import json
import os
import shutil
import signal
import subprocess
import time
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
        (["--stage", "5", "--stop-stage", "3"], ["--stage 5 --stop-stage 3"]),
        (["--", "model.optim.lrr=1"], ["model.optim.lrr", "model.optim.lr?"]),
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


STUB = r"""#!/usr/bin/env bash
# In place of Python: makes what each stage writes, and tells of each call.
echo "$*" >> calls.log
[ -z "${CUDA_VISIBLE_DEVICES+set}" ] || echo "hidden: '$CUDA_VISIBLE_DEVICES' $*" >> hidden.log
value() { local v=${1#*=}; v=${v#\'}; v=${v%\'}; echo "${v//\\\'/\'}"; }
case "$*" in
  *"corpus tests"*) echo "[data/mini/test.json]" ;;
  *recipes.gpu*) if [ -n "${NO_KERNELS:-}" ]; then echo "run.sh: no kernels" >&2; exit 2; fi ;;
  *"corpus fetch"*) mkdir -p data/mini_tree/LibriSpeech ;;
  *"corpus build"*) mkdir -p data/mini; for name in train dev test; do [ -e data/mini/$name.json ] || echo x > data/mini/$name.json; done ;;
  *"doctor check"*)
    mkdir -p "$(dirname "$5")"; touch "$7"
    if [ -n "${SLOW_CHECK:-}" ]; then
      trap 'echo ended >> calls.log; exit 143' TERM
      echo checking >> calls.log
      sleep 60 > /dev/null 2>&1 & wait
    fi ;;
  *tools.ladder*) touch "$6" ;;
  *recipes.train*)
    for word in "$@"; do case "$word" in *explicit_log_dir=*) folder=$(value "$word") ;; esac; done
    mkdir -p "$folder/checkpoints"; touch "$folder/checkpoints/last.ckpt" "$folder/curve.csv"
    if [ -n "${SLOW:-}" ]; then
      trap 'echo saved >> calls.log; exit 143' TERM
      echo training >> calls.log
      sleep 60 > /dev/null 2>&1 & wait
    fi ;;
  *recipes.average*) touch "${@: -1}" ;;
  *recipes.evaluate*) for word in "$@"; do case "$word" in output=*) mkdir -p "${word#*=}"; touch "${word#*=}/metrics.json" ;; esac; done ;;
  *tools.report*) touch "${@: -1}/report.md" "${@: -1}/curve.png" ;;
esac
"""


@pytest.fixture
def stages(tmp_path) -> Path:
    """run.sh with a Python that does nothing but what the stages are asked to leave."""
    target = tmp_path / "a checkout"
    (target / ".venv" / "bin").mkdir(parents=True)
    shutil.copytree(ROOT / "conf", target / "conf")
    for name in ("run.sh", "requirements.lock", "requirements-torch.txt"):
        shutil.copy(ROOT / name, target)
    (target / ".venv" / "bin" / "python").write_text(STUB)
    (target / ".venv" / "bin" / "python").chmod(0o755)
    wanted = "cat requirements.lock requirements-torch.txt | cksum > .venv/.installed"
    subprocess.run(["bash", "-c", wanted], cwd=target, check=True)
    return target


NUMBERS = "0 1 3 4 5 6 7".split()


def done_stages(output: str) -> str:
    return "".join(number for number in NUMBERS if f"== stage {number}: done" in output)


@pytest.mark.parametrize("exp", ["exp/plain", "exp/with space", "exp/é=@(1)", "exp/it's"])
def test_complete_stages_are_skipped_whatever_the_folder_is_called(stages, exp):
    arguments = ["--gpus", "0", "--exp", exp]
    first = run(*arguments, cwd=stages)
    assert first.returncode == 0 and done_stages(first.stdout) == "0134567", first.stdout + first.stderr
    second = run(*arguments, cwd=stages)
    assert second.returncode == 0 and second.stdout.count("complete, skipped") == 7, second.stdout
    assert (stages / exp / "checkpoints" / "last.ckpt").is_file()


@pytest.mark.parametrize(
    "changed, again",
    [
        ("conf/deepspeech2.yaml", "34567"),
        ("conf/base.yaml", "34567"),
        ("conf/conformer.yaml", ""),
        ("conf/size/small.yaml", "34567"),
        ("conf/trainer/cpu.yaml", "34567"),
        ("conf/corpus/mini.yaml", "0134567"),
        ("data/mini/test.json", "67"),
        ("data/mini/train.json", "34567"),
        ("exp/deepspeech2_mini/deepspeech2.nemo", "67"),
    ],
)
def test_what_reads_a_changed_file_is_done_again(stages, changed, again):
    assert run("--gpus", "0", cwd=stages).returncode == 0
    later = (stages / "exp/deepspeech2_mini/.stages/7").stat().st_mtime + 5
    os.utime(stages / changed, (later, later))
    done = run("--gpus", "0", cwd=stages)
    # The file lies in the future, so that all that read it are done again at each start: the first is what counts.
    assert done.returncode == 0 and done_stages(done.stdout) == again, done.stdout


def test_a_missing_test_manifest_is_made_again(stages):
    assert run("--gpus", "0", cwd=stages).returncode == 0
    (stages / "data/mini/test.json").unlink()
    assert "== stage 1: done" in run("--gpus", "0", cwd=stages).stdout


def test_a_training_that_begins_anew_keeps_the_old_checkpoints(stages):
    assert run("--gpus", "0", cwd=stages).returncode == 0
    done = run("--gpus", "0", "--force", "--stage", "4", "--stop-stage", "4", cwd=stages)
    kept = list((stages / "exp/deepspeech2_mini").glob("checkpoints.*/last.ckpt"))
    assert len(kept) == 1 and str(kept[0].parent.relative_to(stages)) in done.stdout


def test_relative_folders_are_those_of_the_caller(stages):
    elsewhere = stages / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(["../run.sh", "--gpus", "0", "--exp", "mine"], cwd=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0 and (elsewhere / "mine" / "report.md").is_file(), done.stderr


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("slow, begun, ended", [("SLOW", "training", "saved"), ("SLOW_CHECK", "checking", "ended")])
def test_a_signal_reaches_what_runs_which_ends_in_its_own_way_and_is_waited_for(stages, slow, begun, ended, signum):
    # As from a terminal: what a shell starts in the background ignores SIGINT, and so would all that it starts.
    process = subprocess.Popen(["./run.sh", "--gpus", "0"], cwd=stages, env={**os.environ, slow: "1"},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    calls = stages / "calls.log"
    deadline = time.monotonic() + 60
    while not (calls.is_file() and begun in calls.read_text().splitlines()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 143 and calls.read_text().endswith(f"{ended}\n")
    assert "the same command goes on" in errors and "trains all the same" not in errors


def test_without_gpus_all_stages_find_none(stages):
    assert run("--gpus", "0", cwd=stages).returncode == 0
    hidden = (stages / "hidden.log").read_text().splitlines()
    for name in ("doctor check", "tools.ladder", "recipes.train", "recipes.average", "recipes.evaluate"):
        assert any(line.startswith("hidden: '' ") and name in line for line in hidden), name


@pytest.fixture
def with_gpu(stages, tmp_path):
    """PATH of a machine whose nvidia-smi lists a GPU."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    return {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}


def test_a_gpu_that_nobody_asked_for_and_torch_cannot_use_is_said_and_left(stages, with_gpu):
    done = run(cwd=stages, NO_KERNELS="1", **with_gpu)
    calls = (stages / "calls.log").read_text()
    assert done.returncode == 0 and done.stderr == "run.sh: no kernels\nrun.sh: goes on with the CPU\n"
    assert "trainer=cpu" in calls and "trainer=gpu" not in calls and "hidden: ''" in (stages / "hidden.log").read_text()
    asked = run("--gpus", "1", cwd=stages, NO_KERNELS="1", **with_gpu)
    assert asked.returncode == 2 and asked.stderr == "run.sh: no kernels\n"


def test_the_environment_for_gpus_is_made_where_they_are_wanted_and_does_for_the_cpu(stages):
    calls = stages / "calls.log"
    assert run("--gpus", "1", "--stop-stage", "1", cwd=stages).returncode == 0
    assert "tools/install.py --cuda\n" in calls.read_text()
    assert (stages / ".venv/.installed").read_text().endswith(" --cuda\n")
    calls.unlink()
    for gpus in ("1", "0"):
        assert run("--gpus", gpus, "--stop-stage", "1", cwd=stages).returncode == 0
    assert "tools/install.py" not in calls.read_text()


def test_on_several_nodes_the_build_of_torch_is_asked(stages):
    done = run("--nodes", "2", "--gpus", "8", cwd=stages, NO_KERNELS="1")
    assert done.returncode == 2 and "recipes.gpu 8 --elsewhere\n" in (stages / "calls.log").read_text()


@pytest.mark.parametrize("trained", ["curve.csv", "checkpoints"])
def test_a_training_that_run_sh_did_not_start_is_averaged_and_evaluated(stages, trained):
    assert run("--gpus", "0", cwd=stages).returncode == 0
    folder = stages / "exp/deepspeech2_mini"
    later = (folder / ".stages/7").stat().st_mtime + 5
    os.utime(folder / trained, (later, later))
    done = run("--gpus", "0", "--stage", "5", cwd=stages)
    assert done.returncode == 0 and done_stages(done.stdout) == "567", done.stdout


def test_the_test_manifests_of_an_override_are_evaluated_on(stages):
    arguments = ["--gpus", "0", "--", "corpus.test=[other/a.json, other/b.json]"]
    assert run(*arguments, cwd=stages).returncode == 0
    assert "manifests=[other/a.json, other/b.json]" in (stages / "calls.log").read_text()
    assert done_stages(run(*arguments, cwd=stages).stdout) == ""


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
