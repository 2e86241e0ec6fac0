"""Slow: the first part of each recipe on mini, with its own schedule, against the band of its committed runs."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tools.doctor import bands, examine

STEPS = 140  # two epochs
MINI = ROOT / "data" / "mini"


@pytest.fixture(scope="module")
def mini() -> None:
    """The mini corpus where ./run.sh puts it; made by its first two stages where they have not run."""
    if not (MINI / "train.json").is_file():
        subprocess.run(["./run.sh", "--stop-stage", "1"], cwd=ROOT, check=True, timeout=600)


def last_step(folder: Path) -> int:
    path = folder / "curve.csv"
    return bands.read_curve(path)["loss_per_char"][-1][0] if path.is_file() and path.read_text().count("\n") > 1 else 0


@pytest.mark.parametrize("recipe", ["deepspeech2", "deepspeech", "conformer", "conformer_bpe"])
def test_the_first_part_of_a_recipe_stays_in_the_band_of_its_committed_runs(recipe, mini, tmp_path):
    more = []
    if recipe == "conformer_bpe":
        more = [f"model.tokenizer.dir={tmp_path}/tokenizer"]
        subprocess.run(
            [sys.executable, "-m", "manifests.tokenizer", MINI / "train.json", "--out", tmp_path / "tokenizer"],
            cwd=ROOT, check=True, timeout=100,
        )
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "recipes.train", "--config-name", recipe, "corpus=mini",
         f"exp_manager.explicit_log_dir={folder}", *more],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:  # the schedule is that of the whole run, so it is ended from outside
        deadline = time.monotonic() + 1200
        while last_step(folder) < STEPS and time.monotonic() < deadline:
            assert process.poll() is None, "the run ended by itself"
            time.sleep(0.5)
    finally:
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=120)
    assert status == 143 and last_step(folder) >= STEPS

    band = bands.load(recipe, "mini")
    curve = bands.read_curve(folder / "curve.csv")
    for column in ("loss_per_char", "blank_rate"):
        limits = [bands.at(band, column, step) for step, _ in curve[column]]
        outside = [
            f"step {step}: {value:.3g}, healthy {low:.3g} to {high:.3g}"
            for (step, value), (low, high) in zip(curve[column], limits)
            if value > high or (column == "blank_rate" and value < low)
        ]
        assert len(outside) <= 0.1 * len(limits), f"{column}: " + "; ".join(outside)
    notes = [finding for finding in examine(run=folder).findings if "healthy run of" in finding.symptom]
    assert [note.weight for note in notes] == ["note"], json.dumps([note.symptom for note in notes])
