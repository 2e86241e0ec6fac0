"""The bench of devices: what it compares, and what it says of runs that cannot be compared."""

import json

import pytest

from tools.bench import devices
from tools.bench._common import BenchError

CURVE = """step,loss_per_char,val_loss,val_wer
10,2.9,,
20,2.5,2.4,1.0
30,2.0,,
40,1.5,1.2,0.75
"""


def test_validations_are_the_rows_of_a_curve_that_have_one(tmp_path):
    (tmp_path / "curve.csv").write_text(CURVE)
    assert devices.validations(tmp_path / "curve.csv") == [
        {"step": 20, "val_loss": 2.4, "val_wer": 1.0}, {"step": 40, "val_loss": 1.2, "val_wer": 0.75},
    ]


def run(*losses, steps=(20, 40)):
    return [{"step": step, "val_loss": loss, "val_wer": loss / 4} for step, loss in zip(steps, losses)]


def test_the_result_says_how_far_processes_and_seeds_lie_apart(tmp_path, monkeypatch, capsys):
    runs = {(1, 1234): run(2.0, 1.0), (1, 4321): run(2.0, 1.05), (2, 1234): run(2.1, 1.0), (4, 1234): run(1.8, 0.99)}
    monkeypatch.setattr(devices, "train", lambda options, folder, processes, seed: runs[processes, seed])
    assert devices.main(["--json", str(tmp_path / "devices.json"), "--steps", "40", "--", "size=small"]) == 0
    result = json.loads((tmp_path / "devices.json").read_text())
    assert result["farthest"] == {"processes": pytest.approx(0.1), "seed": pytest.approx(0.05)}
    assert result["table"]["rows"][0] == ["20", "2.000 (50.0%)", "2.000 (50.0%)", "2.100 (52.5%)", "1.800 (45.0%)"]
    assert "at most 10.0% from that of one process; another seed is at most 5.0%" in capsys.readouterr().out
    assert "at most 10.0%" in (tmp_path / "README.md").read_text()


def test_all_runs_have_the_same_recipe_but_for_the_processes(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(devices, "train", lambda options, folder, processes, seed: seen.setdefault(
        (processes, seed), devices.command(options, folder.name, processes, seed)) and run(1.0, 1.0))
    manifests = [tmp_path / "a.json", tmp_path / "b.json"]
    words = ["--json", str(tmp_path / "o.json"), "--manifest", str(manifests[0]), "--dev", str(manifests[1])]
    assert devices.main([*words, "--", "a=b"]) == 0
    one, four = ({w for w in seen[n, 1234] if not w.startswith("exp_manager")} for n in (1, 4))
    assert not any("," in word for words in seen.values() for word in words)  # Hydra would read a list
    assert four - one == {"trainer=cpu_ddp", "trainer.devices=4"} and not one - four
    assert {f"corpus.train={manifests[0]}", "a=b", "seed=1234"} <= one


def test_runs_validated_at_other_steps_are_not_compared():
    with pytest.raises(BenchError, match="other steps"):
        devices.compare({"a": run(1.0, 1.0), "b": run(1.0, 1.0, steps=(20, 41))})


def test_a_run_that_fails_is_one_line(tmp_path, capsys):
    assert devices.main(["--json", str(tmp_path / "o.json"), "--recipe", "deepspeech9", "--processes", "2"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("bench devices: training on 1 process(es) ended with status 2: ") and "deepspeech9" in error
    assert not (tmp_path / "o.json").exists()


def test_one_process_is_always_there_and_not_to_be_asked_for(capsys):
    with pytest.raises(SystemExit):
        devices.main(["--processes", "1"])
    assert "name the numbers above 1" in capsys.readouterr().err
