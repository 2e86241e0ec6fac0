"""What lies in a run's folder before training goes on in it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from recipes import resume
from recipes.config import ConfigError
from tests.conftest import ROOT

CFG = {
    "name": "deepspeech2", "seed": 1, "init_from": None, "resume_with_changes": False,
    "corpus": {"name": "mini", "epochs": 4}, "training": {"global_batch_seconds": 64, "epochs": 4},
    "trainer": {"max_steps": 100, "devices": 1, "strategy": "auto", "gradient_clip_val": 1.0},
    "model": {"optim": {"lr": 1e-5}, "spec_augment": {"warp": 0.1}, "labels": ["a", "b"],
              "train_ds": {"num_workers": 0, "batch_duration": 64.0, "seed": 1}},
}  # fmt: skip


def changed(**values) -> dict:
    cfg = OmegaConf.create(CFG)
    for key, value in values.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, merge=False)
    return cfg


def write_checkpoint(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:  # what torch.save writes
        file.writestr("archive/data.pkl", "x" * 1000)


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run, with a checkpoint."""
    (tmp_path / "checkpoints").mkdir()
    write_checkpoint(tmp_path / "checkpoints" / "a-last.ckpt")
    OmegaConf.save(OmegaConf.create(CFG), tmp_path / "config.yaml")
    return tmp_path


@pytest.mark.parametrize(
    "values, words",
    [
        ({"model__optim__lr": 2e-5}, "model.optim.lr was 1e-05, now 2e-05;"),
        ({"trainer__max_steps": 50, "model__optim__lr": 2e-5}, r"trainer.max_steps was 100, now 50 \(1 more\);"),
        ({"model__spec_augment": None}, "model.spec_augment was not there, now None"),
        ({"model__labels": ["a"]}, "model.labels was"),
        ({"corpus__name": "other"}, "corpus.name was mini, now other"),
        ({"training__global_batch_seconds": 32}, "training.global_batch_seconds was 64, now 32"),
    ],
)
def test_a_folder_with_a_run_of_other_settings_is_refused_and_the_key_is_named(run, values, words):
    with pytest.raises(ConfigError, match=words) as error:
        resume.refuse_another_run(run, changed(**values))
    assert str(run) in str(error.value) and "\n" not in str(error.value)
    resume.refuse_another_run(run, changed(resume_with_changes=True, **values))


def test_where_and_on_what_a_run_goes_on_is_free(run):
    resume.refuse_another_run(run, changed())
    resume.refuse_another_run(run, changed(
        trainer__devices=4, trainer__strategy="ddp", model__train_ds__batch_duration=16.0, training__epochs=9,
        model__train_ds__num_workers=2, init_from="other.nemo"))


def test_a_folder_without_a_checkpoint_is_nobodys(run):
    (run / "checkpoints" / "a-last.ckpt").unlink()
    resume.refuse_another_run(run, changed(seed=2))
    assert resume.last_checkpoint(run) is None and resume.last_checkpoint(run / "none") is None


def test_after_a_kill_one_whole_checkpoint_is_left(run):
    folder = run / "checkpoints"
    mark = folder / "a-last-unfinished"
    mark.touch()  # killed while the same name was saved again
    resume.settle_checkpoints(run)
    assert not mark.exists() and [path.name for path in folder.iterdir()] == ["a-last.ckpt"]

    os.utime(folder / "a-last.ckpt", (1, 1))
    (folder / "b-last.ckpt").write_bytes((folder / "a-last.ckpt").read_bytes()[:100])
    (folder / "b-last-unfinished").touch()  # killed while a new name was written
    resume.settle_checkpoints(run)
    assert sorted(path.name for path in folder.iterdir()) == ["a-last.ckpt", "b-last-unfinished", "b-last.ckpt"]
    write_checkpoint(folder / "b-last.ckpt")  # killed before the old name was removed
    resume.settle_checkpoints(run)
    assert [path.name for path in folder.iterdir()] == ["b-last.ckpt"]
    resume.settle_checkpoints(run / "none")


def test_results_are_put_back_and_newer_ones_stay(run):
    moved = run / "run_0"
    moved.mkdir()
    for name in ("deepspeech2.nemo", "average.json", "cmd-args.log"):
        (moved / name).write_text("earlier")
    (run / "average.json").write_text("now")
    resume.put_back(run)
    assert (run / "deepspeech2.nemo").read_text() == "earlier" and (run / "average.json").read_text() == "now"
    assert not (run / "cmd-args.log").exists()


def test_two_runs_cannot_have_one_folder(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from recipes import resume; lock = resume.hold(Path(sys.argv[1])); "
        "print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"process {holder.pid}.*explicit_log_dir"):
            resume.hold(tmp_path)
    finally:
        holder.kill()
        holder.wait()
    resume.hold(tmp_path).close()  # free again after kill -9
