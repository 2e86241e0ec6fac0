"""Processes of a training: who starts them, that all are there, that none outlives the first. No GPU, no cluster."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from recipes import cluster
from recipes.config import ConfigError

SLURM = {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "here", "MASTER_PORT": "1234"}


@pytest.fixture
def environment(monkeypatch):
    def made(**values):
        for name in (*SLURM, *TORCHRUN, "RANK", "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", "SLURM_STEP_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return made


@pytest.mark.parametrize("nodes, devices, more, kept", [
    (1, 8, {}, False),  # an interactive job, or sbatch of one task: Lightning starts the others
    (1, 8, {"SLURM_NTASKS": "8"}, True),  # srun has started them
    (2, 8, {"SLURM_NTASKS": "16"}, True),
    (1, 1, {}, True),
    (1, 4, {"RANK": "0"}, True),  # torchrun within a job
])
def test_what_slurm_says_of_one_task_is_no_rank_of_ours(environment, nodes, devices, more, kept):
    environment(**{**SLURM, **more})
    cluster.start_processes_here(nodes, devices)
    assert ("SLURM_PROCID" in os.environ) is kept and ("SLURM_NTASKS" in os.environ) is kept
    assert os.environ["SLURM_JOB_ID"] == "7"


@pytest.mark.parametrize("first, other, same", [
    (SLURM, {**SLURM, "SLURM_PROCID": "5"}, True),
    (SLURM, {**SLURM, "SLURM_RESTART_COUNT": "1"}, False),  # requeued
    (TORCHRUN, {**TORCHRUN, "RANK": "3", "SLURM_PROCID": "1"}, True),
    (TORCHRUN, {**TORCHRUN, "MASTER_PORT": "1235"}, False),
])
def test_other_processes_wait_for_the_first_of_their_own_start(environment, monkeypatch, tmp_path, first, other, same):
    monkeypatch.setattr(cluster, "FIRST_PATIENCE", 0.5)
    environment(**other)
    with pytest.raises(ConfigError, match="the first process"):
        cluster.wait_until_ready(tmp_path / "settled")
    environment(**first)
    cluster.say_ready(tmp_path / "settled")
    environment(**other)
    if same:
        cluster.wait_until_ready(tmp_path / "settled")
        os.utime(tmp_path / "settled", (0, 0))  # an earlier start: torchrun gives it the same names at a given address
        with pytest.raises(ConfigError, match="settled: the first process"):
            cluster.wait_until_ready(tmp_path / "settled")
    else:
        with pytest.raises(ConfigError, match="settled: the first process"):
            cluster.wait_until_ready(tmp_path / "settled")


def test_processes_that_the_first_starts_need_no_mark(environment, tmp_path):
    environment()
    cluster.say_ready(tmp_path / "settled")
    cluster.wait_until_ready(tmp_path / "settled")
    assert not list(tmp_path.iterdir())


def test_as_many_processes_as_devices():
    cluster.check_world(8, 8)
    with pytest.raises(ConfigError, match="8 devices are configured .* and 1 processes are there"):
        cluster.check_world(1, 8)


def started(*codes):
    """A trainer whose launcher has started processes: each sleeps for long, or ends with a status at once."""
    children = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)" if code is None else
                                  f"raise SystemExit({code})"]) for code in codes]
    return SimpleNamespace(strategy=SimpleNamespace(launcher=SimpleNamespace(procs=children))), list(children)


@pytest.mark.parametrize("codes", [(None, None), (None, 1), (143, 143)])
def test_an_error_ends_the_other_processes_and_is_passed_on(monkeypatch, codes):
    monkeypatch.setattr(cluster, "PATIENCE", 3.0)
    trainer, children = started(*codes)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="out of memory"), cluster.children_end_with(trainer):
        raise RuntimeError("out of memory")
    assert [child.returncode for child in children] == [-signal.SIGKILL if code is None else code for code in codes]
    assert trainer.strategy.launcher.procs == [] and time.monotonic() - begin < 20


def test_a_training_that_ends_well_leaves_its_processes_to_lightning():
    trainer, (child,) = started(0)
    with cluster.children_end_with(trainer):
        pass
    assert trainer.strategy.launcher.procs == [child] and child.wait(30) == 0
    with pytest.raises(KeyError), cluster.children_end_with(SimpleNamespace(strategy=SimpleNamespace())):
        raise KeyError
