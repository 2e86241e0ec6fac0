"""Runs that differ in their seed alone: what is kept of them, their spread, and what is refused."""

import json
import statistics
from pathlib import Path

import pytest

from tests.tools.test_report import CURVE, HOW
from tools.doctor import bands
from tools.report.results import page
from tools.report.seeds import main, spread_table

CONFIG = """name: {recipe}
seed: {seed}
corpus: {{name: mini}}
model: {{train_ds: {{seed: {seed}}}, optim: {{lr: {lr}}}}}
trainer: {{max_steps: 20}}
exp_manager: {{explicit_log_dir: exp/{seed}}}
"""


@pytest.fixture
def make(tmp_path):
    def make(seed: int, wer: float, lr: float = 0.002, recipe: str = "deepspeech2", more: str = "") -> Path:
        folder = tmp_path / f"run{seed}_{wer}"
        (folder / "evaluation").mkdir(parents=True)
        (folder / "curve.csv").write_text(CURVE)
        (folder / "config.yaml").write_text(CONFIG.format(recipe=recipe, seed=seed, lr=lr) + more)
        (folder / "git-info.log").write_text("commit hash: 0123456789abcdef\n")
        part = {"utterances": 9, "wer": wer, "cer": wer / 4}
        metrics = {"manifests": [{"name": "test", **part}], "overall": part, **HOW}
        (folder / "evaluation" / "metrics.json").write_text(json.dumps(metrics))
        return folder

    return make


def run(capsys, folders, out) -> tuple[int, str]:
    status = main([*map(str, folders), "--publish", str(out), "--command", "./run.sh -- seed=N"])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_curves_and_rates_of_each_seed_are_kept_and_the_spread_is_told(make, tmp_path, capsys):
    rates = {3: 0.10, 1: 0.08, 2: 0.09}
    out = tmp_path / "recipes" / "deepspeech2" / "results" / "seeds"
    status, said = run(capsys, [make(seed, wer) for seed, wer in rates.items()], out)
    assert status == 0
    assert sorted(p.name for p in out.iterdir()) == ["mini.json", "mini.png", "mini_1.csv", "mini_2.csv", "mini_3.csv"]
    kept = json.loads((out / "mini.json").read_text())
    assert [(r["seed"], r["steps"], r["test_sets"]["test"]["wer"]) for r in kept["runs"]] == [
        (1, 20, 0.08), (2, 20, 0.09), (3, 20, 0.10)
    ]
    assert {r["commit"] for r in kept["runs"]} == {"0123456"} and str(tmp_path) not in (out / "mini.json").read_text()
    deviation = 100 * statistics.stdev(rates.values())
    assert f"| all | 3 | 9.00 | {deviation:.2f} | 8.00 to 10.00 | 2.25 |" in said
    band = bands.learn(sorted(out.glob("*.csv")), "deepspeech2", "mini")
    assert band["runs"] == 3 and band["margin"] == bands.MARGIN[3]
    assert "\n".join(spread_table(kept)) in page(tmp_path) and "## From seed to seed" in page(tmp_path)


def test_a_recipe_in_the_folder_of_another_is_named(make, tmp_path, capsys):
    out = tmp_path / "recipes" / "conformer" / "results" / "seeds"
    status, _ = run(capsys, [make(1, 0.1, recipe="conformer_bpe"), make(2, 0.1, recipe="conformer_bpe")], out)
    assert status == 0 and (out / "conformer_bpe_mini_2.csv").is_file()


def test_what_is_no_set_of_seeds_is_refused_in_one_line_and_leaves_nothing(make, tmp_path, capsys):
    out = tmp_path / "seeds"
    first = make(1, 0.1)
    for other, why in [
        (make(1, 0.2), "the runs have the seeds [1, 1]: give each another one"),
        (make(2, 0.1, lr=0.004), "differs from"),
        (make(2, 0.4, more="init_from: conformer\n"), "init_from was None, now conformer"),
        (make(3, 0.1, recipe="conformer"), "name was deepspeech2, now conformer"),
        (tmp_path / "nothing", "there is no such folder"),
    ]:
        status, said = run(capsys, [first, other], out)
        assert status == 1 and why in said and said.count("\n") == 1, said
    assert "model.optim.lr was 0.002, now 0.004" in run(capsys, [first, make(4, 0.1, lr=0.004)], out)[1]
    assert not out.exists()
