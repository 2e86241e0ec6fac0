"""Which checkpoints of a run are averaged: the best by what the run monitors."""

import os

import pytest

from recipes.average import AverageError, best_checkpoints


@pytest.fixture
def run(tmp_path):
    def made(config: str | None, *names: str):
        (tmp_path / "checkpoints").mkdir()
        for at, name in enumerate(names):
            (tmp_path / "checkpoints" / name).touch()
            os.utime(tmp_path / "checkpoints" / name, (at, at))
        if config is not None:
            (tmp_path / "config.yaml").write_text(config)
        return tmp_path

    return made


WATCH = "exp_manager: {{checkpoint_callback_params: {{monitor: {}, mode: {}}}}}\n"


@pytest.mark.parametrize("config, name", [
    (None, "val_wer"), ("name: x\n", "val_wer"), (WATCH.format("val_wer", "min"), "val_wer"),
    (WATCH.format("val_cer", "min"), "val_cer"), (WATCH.format("val_cer", "null"), "val_cer"),
])
def test_the_best_come_first_by_what_is_monitored(run, config, name, capsys):
    files = [f"x--{name}={value}-epoch=3{end}.ckpt" for value, end in (
        ("0.5000", ""), ("0.0463", ""), ("0.1000", "-v1"), ("0.0100", "-last"))]
    found = [path.name for path in best_checkpoints(run(config, *files))]
    assert found == [files[1], files[2], files[0]] and capsys.readouterr().out == ""


def test_the_highest_is_the_best_where_the_mode_says_so(run):
    files = [f"x--val_blank_rate={value}-epoch=3.ckpt" for value in ("0.5", "0.9", "0.1")]
    assert [path.name for path in best_checkpoints(run(WATCH.format("val_blank_rate", "max"), *files))] == [
        files[1], files[0], files[2]]


def test_without_what_is_monitored_the_newest_last_one_is_taken_and_said(run, capsys):
    files = ["z--val_cer=0.1-epoch=9.ckpt", "b--val_cer=0.9-epoch=1-last.ckpt", "a--val_cer=0.5-epoch=2-last.ckpt",
             "x--val_cer=0.1-epoch=3.ckpt"]
    assert [path.name for path in best_checkpoints(run(None, *files))] == [files[2]]
    assert f"has val_wer in its name: {files[2]}, the newest" in capsys.readouterr().out


def test_a_run_without_checkpoints_is_one_line(run):
    with pytest.raises(AverageError, match="no checkpoint; train first"):
        best_checkpoints(run(None))
