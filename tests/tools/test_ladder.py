"""The first rungs of the ladder: what fits, what is learned by heart, and what is said when it is not."""

import json

import pytest

from recipes.config import compose
from tools.ladder.__main__ import RungFailed, choose, climb, main, without_regularisation


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    from manifests.librispeech import build_rows
    from manifests.schema import write_manifest
    from tests.conftest import SHARED

    tree = SHARED / "librispeech" / "sample" / "LibriSpeech"
    if not tree.is_dir():
        pytest.skip("real LibriSpeech sample ../shared/librispeech/sample is not on this machine")
    folder = tmp_path_factory.mktemp("ladder")
    rows = build_rows(tree, "train-clean-5")
    write_manifest(folder / "train.json", rows)
    write_manifest(folder / "dev.json", rows[:5])
    return [f"corpus.train={folder}/train.json", f"corpus.validation={folder}/dev.json", "corpus.max_duration=20"]


# The claim of each recipe: one batch of real speech is learned by heart. The models are the recipes' own small ones.
@pytest.mark.parametrize("recipe", ["deepspeech", "deepspeech2", "conformer", "conformer_bpe"])
def test_every_recipe_learns_eight_real_utterances_by_heart(recipe, overrides, tmp_path):
    if recipe == "conformer_bpe":
        from manifests.tokenizer import train

        train([overrides[0].split("=")[1]], tmp_path / "tokenizer", 128)
        overrides = [*overrides, f"model.tokenizer.dir={tmp_path}/tokenizer"]
    out = tmp_path / "one_batch.json"
    assert main(["--out", str(out), "--config-name", recipe, *overrides]) == 0
    batch = json.loads(out.read_text())["batch"]
    assert batch["utterances"] == 8 and batch["wer"] == 0
    assert all(pair["reference"] == pair["hypothesis"] for pair in batch["transcripts"])
    assert not out.with_suffix(".part").exists()


def test_a_model_that_cannot_learn_is_said_to_be_at_fault(overrides):
    cfg = without_regularisation(compose("deepspeech2", overrides))
    with pytest.raises(RungFailed, match="not learned by heart in 10 steps: WER .* The fault is in the model"):
        climb(cfg, max_steps=10)


def test_targets_that_do_not_fit_are_refused_before_training(overrides):
    strides = ["model.encoder.conv_strides=[[2,4],[2,4]]"]
    cfg = without_regularisation(compose("deepspeech2", [*overrides, *strides]))
    with pytest.raises(RungFailed, match="targets do not fit into the output.*lower the encoder's subsampling factor"):
        climb(cfg, max_steps=10)


def test_choose_spreads_over_the_manifest_and_prefers_short_utterances():
    rows = [{"duration": d, "utterance": str(i)} for i, d in enumerate([1, 3, 30, 4, 5, 6, 7, 2.5, 3.5, 12, 5, 6])]
    chosen = choose(rows, 4)
    assert len(chosen) == 4 and all(2 <= row["duration"] <= 8 for row in chosen)
    assert len(choose(rows[:3], 8)) == 3
