"""The ladder: what fits, what is learned by heart, what the rungs above train on, and what is said when one fails."""

import json
import os
import signal
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from manifests.schema import read_manifest, write_manifest
from recipes.config import ConfigError, compose
from tools.ladder import process, rungs
from tools.ladder.__main__ import RungFailed, choose, climb, main, without_regularisation
from tools.ladder.climb import Ladder
from tools.ladder.climb import climb as climb_rungs
from tools.ladder.rungs import ALL, HEART, HOUR, Rung, override_lines, quote, settings, spread, subset, up_to, usable
from tools.ladder.table import markdown
from tools.ladder.verdict import Course, failed, passed
from tools.report.curve import read_curve


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(folder of train.json and dev.json, rows of train): real speech."""
    from manifests.librispeech import build_rows
    from tests.conftest import SHARED

    tree = SHARED / "librispeech" / "sample" / "LibriSpeech"
    if not tree.is_dir():
        pytest.skip("real LibriSpeech sample ../shared/librispeech/sample is not on this machine")
    folder = tmp_path_factory.mktemp("ladder")
    rows = build_rows(tree, "train-clean-5")
    write_manifest(folder / "train.json", rows)
    write_manifest(folder / "dev.json", rows[:5])
    return folder, rows


@pytest.fixture(scope="module")
def overrides(corpus):
    folder, _ = corpus
    return [f"corpus.train={folder}/train.json", f"corpus.validation={folder}/dev.json", "corpus.max_duration=20"]


# ---- the first rung ------------------------------------------------------------------------------------------------


# The claim of each recipe: one batch of real speech is learned by heart. The models are the recipes' own small ones.
@pytest.mark.parametrize("recipe", ["deepspeech", "deepspeech2", "conformer", "conformer_bpe"])
def test_every_recipe_learns_eight_real_utterances_by_heart(recipe, overrides, tmp_path):
    if recipe == "conformer_bpe":
        from manifests.tokenizer import train

        train([overrides[0].split("=")[1]], tmp_path / "tokenizer", 128)
        overrides = [*overrides, f"model.tokenizer.dir={tmp_path}/tokenizer"]
    out = tmp_path / "one_batch.json"
    assert main(["--out", str(out), "--config-name", recipe, *overrides]) == 0
    measured = json.loads(out.read_text())
    assert set(measured) == {"recipe", "fit", "batch"}
    batch = measured["batch"]
    assert batch["utterances"] == 8 and batch["wer"] == 0
    assert all(pair["reference"] == pair["hypothesis"] for pair in batch["transcripts"])
    assert [path.name for path in tmp_path.glob("*one_batch*")] == ["one_batch.json"]  # nothing half written is left


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


# ---- what a rung trains on -----------------------------------------------------------------------------------------


def many_rows(speakers=10, each=60):
    return [
        {"audio_filepath": f"/x/{s}-{i}.flac", "duration": 3.0 + i % 12, "text": "a b", "speaker": str(s),
         "utterance": f"{s}-{i}"} for s in range(speakers) for i in range(each)
    ]


def test_subsets_are_spread_over_speakers_and_depend_on_the_ids_alone():
    rows = many_rows()
    heart, hour = subset(HEART, rows), subset(HOUR, rows)
    assert len(heart) == 64 and all(2 <= row["duration"] <= 8 for row in heart)
    counts = [sum(row["speaker"] == str(s) for row in heart) for s in range(10)]
    assert set(counts) == {6, 7}
    assert 3600 <= sum(row["duration"] for row in hour) < 3615
    moved = [{**row, "audio_filepath": f"/elsewhere/{row['utterance']}.flac"} for row in reversed(rows)]
    for rung, chosen in ((HEART, heart), (HOUR, hour), (ALL, spread(rows))):
        assert [row["utterance"] for row in subset(rung, moved)] == [row["utterance"] for row in chosen]
    assert len(subset(ALL, rows)) == len(rows)
    assert len(subset(HEART, rows[:20])) == 20  # a corpus smaller than the rung is taken whole
    by_file = [{key: value for key, value in row.items() if key != "utterance"} for row in rows]
    assert len({row["audio_filepath"] for row in subset(HEART, by_file)}) == 64


def test_rows_that_training_would_not_take_are_left_out_and_shards_refused():
    rows = many_rows(1, 30)
    assert {row["duration"] for row in usable(rows, 4.0, 6.0)} == {4.0, 5.0, 6.0}
    with pytest.raises(ConfigError, match="no utterance of the training manifest is between 0.1 and 1.0 s"):
        usable(rows, 0.1, 1.0)
    with pytest.raises(ConfigError, match="of shards: give the manifest that they were made from"):
        usable([{**rows[0], "tar_offset": 512, "tar_bytes": 9, "shard_id": 0}], 0.1, 20)


def test_a_rung_changes_what_it_says_and_nothing_else(overrides):
    cfg = compose("conformer", [*overrides, "corpus=librispeech_8h", *overrides])
    heart, hour = settings(HEART, cfg, 320.0), settings(HOUR, cfg, 3600.0)
    assert settings(ALL, cfg, 28800.0) == {}
    assert heart["training.global_batch_seconds"] == 40 and hour["training.global_batch_seconds"] == 64
    silenced = {"model.encoder.dropout", "model.encoder.dropout_pre_encoder", "model.encoder.dropout_att",
                "model.spec_augment", "model.preprocessor.dither", "model.tempo", "model.consistency_weight",
                "model.noise_and_rooms", "init_from"}
    assert set(heart) - set(hour) == silenced and not set(hour) - set(heart)
    tokens = compose("conformer_bpe", ["model.tokenizer.dir=x", *overrides, "corpus=librispeech_8h", *overrides])
    assert settings(HEART, tokens, 320.0)["model.bpe_dropout"] == 0.0
    folder = "/tmp/it's, a={b} \\'c"
    changed = {**heart, "exp_manager.explicit_log_dir": folder}
    merged = compose("conformer", override_lines([*overrides, "training.epochs=3", "model.optim.lr=1e-3"], changed))
    assert merged.training.epochs == 250 and merged.model.optim.lr == 1e-3 and merged.model.spec_augment is None
    assert merged.exp_manager.explicit_log_dir == folder
    assert merged.exp_manager.early_stopping_callback_params.stopping_threshold == pytest.approx(0.05, abs=2e-6)
    assert quote(None) == "null" and quote(True) == "true" and rungs.duration(90.5) == "00:01:30:30"


def test_up_to_takes_the_lower_rungs_with_them():
    assert [rung.name for rung in up_to("all", {"64": {"target": 0.5}})] == ["64", "1h", "all"]
    assert up_to("64", {"64": {"target": 0.5}}) == [replace(HEART, target=0.5)] and up_to("batch") == []


# ---- what is said --------------------------------------------------------------------------------------------------


def course(errors, loss=0.5, validation=0.6, **more):
    at = [10 * (i + 1) for i in range(len(errors))]
    return Course(steps=at[-1], seconds=60.0 * len(errors), losses=[(at[-1], loss)], errors=list(zip(at, errors)),
                  validation_losses=[(at[-1], validation)], clock={step: 6.0 * step for step in at}, **more)


@pytest.mark.parametrize("rung, errors, rates, words", [
    (HEART, [1.0] * 12, (1.0, 1.0), "not capacity and not overfitting. Left is what one batch does not show"),
    (HOUR, [1.0] * 12, (0.9, 0.95), "texts that do not belong to their audio"),
    (HOUR, [0.9, 0.7, 0.6, 0.6, 0.6, 0.59, 0.6, 0.6], (0.6, 0.7), "falls and then stays: .* or capacity"),
    (HOUR, [0.9, 0.8, 0.7, 0.6, 0.55, 0.5, 0.45, 0.4], (0.4, 0.6), "still falling: it is slow, not stuck"),
    (ALL, [0.6, 0.55, 0.5, 0.5], (0.05, 0.5), "learned and dev is not: overfitting"),
    (ALL, [0.6, 0.55, 0.5, 0.5, 0.5], (0.45, 0.5), "capacity, the number of passes"),
])
def test_a_failed_rung_says_what_it_rules_out(rung, errors, rates, words):
    import re

    message = failed(rung, course(errors), *rates)
    assert message.startswith(f"rung {rung.name}: CER {rates[0]:.1%} on what it trains on") and "\n" not in message
    assert re.search(words, message), message


def test_modes_that_disagree_and_divergence_are_told_apart_from_slow_learning():
    apart = failed(HEART, course([1.0, 1.0], loss=0.1, validation=4.0), 1.0, 1.0)
    assert "0.10 nats a character in training and 4.00 in evaluation mode: the two modes disagree" in apart
    diverged = failed(HOUR, course([1.0], status=3, last_line="step 5: loss is nan"), 1.0, 1.0)
    assert "training diverged (step 5: loss is nan). 64 utterances were learned by heart" in diverged


def test_a_climbed_rung_tells_step_and_time_and_what_does_not_carry_over(tmp_path):
    run = course([0.9, 0.3, 0.19, 0.1])
    assert run.reached(0.2) == (30, 180.0) and run.reached(0.05) is None
    assert passed(HOUR, run, 0.19, 0.5) == "train CER at most 20% at step 30, after 3.0 min"
    assert "does not carry over at all. Overfitting" in passed(HOUR, run, 0.19, 0.9)
    assert "carry over" not in passed(HEART, run, 0.04, 0.9)  # nobody expects it of 64 sentences
    (tmp_path / "curve.csv").write_text(
        "step,seconds,loss_per_char,val_loss,val_cer\n10,2.0,3.0,,\n10,2.5,,2.9,1.0\n20,4.5,1.0,,\n20,5.0,,0.9,0.15\n"
    )
    read = Course.read(tmp_path / "curve.csv")
    assert read.reached(0.2) == (20, 5.0) and (read.steps, read.seconds) == (20, 5.0)
    assert Course.read(tmp_path / "none.csv") == Course()


def test_wrong_options_are_one_line(overrides, tmp_path, capsys):
    for given, words in ((["--target", "2h=0.1"], "must be one of 64, 1h, all"),
                         (["--target", "64=5"], "'5' must be a number over 0 and below 1"),
                         (["--epochs", "all=3"], "training.epochs=N")):
        with pytest.raises(SystemExit):
            main(["--rungs", "all", *given])
        assert words in capsys.readouterr().err
    (tmp_path / "x.json").write_text("{}")
    assert main(["--rungs", "64", "--out", str(tmp_path / "x.json"), *overrides]) == 1
    assert "above the rung batch this is a folder" in capsys.readouterr().err
    assert main(["--rungs", "64", "--out", str(tmp_path / "y"), *overrides, "corpus.max_duration=0.2"]) == 1
    assert capsys.readouterr().err == "ladder: no utterance of the training manifest is between 0.1 and 0.2 s\n"


# ---- climbing ------------------------------------------------------------------------------------------------------


TINY = [
    "model.encoder.conv_channels=[4,4]", "model.encoder.rnn_layers=1", "model.encoder.rnn_hidden=64",
    "model.preprocessor.features=20", "model.train_ds.num_workers=0", "logger=csv", "trainer.log_every_n_steps=5",
    "corpus.bucket_duration_bins=[8.0]", "training.global_batch_seconds=24",
]
# To have three quarters of the letters of four sentences right takes a model that hears something; this one does it in
# seconds, but not in two of them.
FEW = Rung("64", target=0.25, utterances=4, epochs=200, short=True, regularised=False, validations=20)


def test_the_first_rung_stands_in_the_ladder_with_its_error_on_dev(corpus, tmp_path):
    folder, rows = corpus
    write_manifest(tmp_path / "two.json", sorted(rows, key=lambda row: row["duration"])[:2])
    given = [f"corpus.train={tmp_path}/two.json", f"corpus.validation={folder}/dev.json", *TINY]
    ladder = Ladder("deepspeech2", given, tmp_path / "out")
    assert not climb_rungs(ladder, [FEW], max_steps=2)  # and the rung above is not tried
    assert "not learned by heart in 2 steps" in ladder.results[0]["verdict"]
    assert not (tmp_path / "out" / "ladder.png").exists()  # there is no curve to show

    ladder = Ladder("deepspeech2", given, tmp_path / "out")
    assert climb_rungs(ladder, [], max_steps=800)  # more steps than those that did not do: tried again
    (result,) = ladder.results
    assert result["utterances"] == 2 and result["train"] == {"cer": 0, "wer": 0} and 2 < result["steps"] <= 800
    assert result["dev"]["cer"] > 0.3  # nobody learns to hear from two sentences
    assert read_curve(tmp_path / "out" / "batch" / "curve.csv")["loss_per_char"][-1][0] == result["steps"]
    assert Ladder("deepspeech2", given, tmp_path / "out").batch(800) == result


def test_rungs_go_on_where_they_were_cut_are_not_run_again_and_the_first_that_fails_ends_the_climb(
    corpus, overrides, tmp_path, capsys
):
    folder, rows = corpus
    given = [*overrides, *TINY, f"exp_manager.explicit_log_dir={tmp_path}/run", "training.epochs=1",
             "training.validations=1"]
    out = tmp_path / "ladder"
    hopeless = replace(ALL, target=0.01)  # nothing learns to spell in one pass: the rung that fails on purpose

    # Cut off by its clock, after a moment: the failure is told, and the rung above is not tried.
    short = Ladder("deepspeech2", given, out)
    assert not climb_rungs(short, [replace(FEW, minutes=0.01), hopeless], max_steps=None)
    assert [result["rung"] for result in short.results] == ["64"]
    cut = short.results[0]
    assert cut["verdict"].startswith("rung 64: CER ") and "not 25%. One batch was learned" in cut["verdict"]
    chosen = read_manifest(out / "64" / "train.json")
    assert len(chosen) == 4 and all(os.path.isabs(row["audio_filepath"]) for row in chosen)
    assert cut["hours"] == pytest.approx(sum(row["duration"] for row in chosen) / 3600, abs=1e-4)

    # More time: it goes on from its checkpoint, is climbed, and the next one is trained by the recipe as it is.
    ladder = Ladder("deepspeech2", given, out, ["--rungs", "all"])
    assert not climb_rungs(ladder, [FEW, hopeless], max_steps=None)
    climbed, fallen = ladder.results
    assert f"resumed at step {cut['trained_steps']}" in capsys.readouterr().out
    assert climbed["passed"] and cut["steps"] < climbed["steps"] <= climbed["trained_steps"]
    assert climbed["train"]["cer"] < 0.3 and climbed["minutes"] > 0
    assert not fallen["passed"] and "not 1% on dev. 1 h was learned" in fallen["verdict"]
    assert fallen["utterances"] == len(usable(rows, 0.1, 20)) and (tmp_path / "run" / "config.yaml").is_file()

    written = json.loads((out / "ladder.json").read_text())
    assert [rung["passed"] for rung in written["rungs"]] == [True, False]
    table = (out / "ladder.md").read_text()
    assert "`python -m tools.ladder --rungs all --config-name deepspeech2 corpus.train=" in table
    assert table.count("\n| ") == 3 and "| learned |" in table and "| failed |" in table
    assert (out / "ladder.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (out / "64" / "evaluation" / "dev").iterdir()} == {
        "metrics.json", "predictions_dev.json"}

    # The same command: nothing is trained or evaluated again, and the answer is the same.
    begin = time.perf_counter()
    again = Ladder("deepspeech2", given, out)
    assert not climb_rungs(again, [FEW, hopeless], max_steps=None)
    assert again.results == ladder.results and time.perf_counter() - begin < 10

    # Another command does not go on in this folder, nor from another's training.
    with pytest.raises(ConfigError, match="holds this rung of another command .*remove that folder"):
        Ladder("deepspeech2", [*given, "model.optim.lr=1e-3"], out).rung(FEW)
    with pytest.raises(ConfigError, match=r"holds a run with model.optim.lr=0.004, and 0.001 is asked for"):
        Ladder("deepspeech2", [*given, "model.optim.lr=1e-3"], tmp_path / "other").rung(hopeless)
    assert "Rung 64: train CER at most 25%" in "\n".join(markdown({**written, "rungs": written["rungs"][:1]}))


def test_being_asked_to_end_is_handed_on_to_training_which_saves(tmp_path, monkeypatch):
    script = tmp_path / "trains"
    script.write_text("#!/bin/sh\ntrap 'echo saved; exit 143' TERM\necho ready\nwhile :; do sleep 0.05; done\n")
    script.chmod(0o755)
    monkeypatch.setattr(process, "sys", SimpleNamespace(executable=str(script)))
    log = tmp_path / "train.log"

    def ask():
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and "ready" not in log.read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    log.write_text("an earlier sitting\n")
    threading.Thread(target=ask).start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(process.Interrupted, match="the same command goes on"):
        process.train("deepspeech2", [], log)
    assert signal.getsignal(signal.SIGTERM) is before
    lines = log.read_text().splitlines()
    assert lines[0] == "an earlier sitting" and lines[1].startswith("$ python -m recipes.train")
    assert lines[-1] == "saved"


@pytest.mark.parametrize("status, line, said", [
    (2, "unknown key model.optim.lrr", "rung 64: unknown key model.optim.lrr"),
    (1, "", "rung 64: training ended with status 1; read .*train.log"),
    (0, "", "rung 64: .*/checkpoints has no checkpoint"),
])
def test_training_that_did_not_train_is_said_in_one_line(status, line, said, overrides, tmp_path, monkeypatch):
    trains_as(tmp_path, monkeypatch, status, line)
    with pytest.raises(process.TrainingFailed, match=said):
        Ladder("deepspeech2", overrides, tmp_path / "ladder").rung(FEW)
    assert not list(tmp_path.rglob("rung.json"))


def test_a_rung_that_diverged_at_once_is_a_failed_rung(overrides, tmp_path, monkeypatch):
    trains_as(tmp_path, monkeypatch, 3, "step 3: loss is nan")
    ladder = Ladder("deepspeech2", overrides, tmp_path / "ladder")
    assert not climb_rungs(ladder, [FEW, ALL], max_steps=None)
    (result,) = ladder.results
    assert result["verdict"].startswith("rung 64: training diverged (step 3: loss is nan). One batch was learned")
    assert result["train"] is None and "| - | - | - | failed |" in (tmp_path / "ladder" / "ladder.md").read_text()


def trains_as(folder, monkeypatch, status, line):
    """In place of training: a process that prints `line` as train.py does and ends with `status`."""
    script = folder / "python"
    script.write_text(f"#!/bin/sh\necho starting\necho 'train.py: {line}'\nexit {status}\n")
    script.chmod(0o755)
    monkeypatch.setattr(process, "sys", SimpleNamespace(executable=str(script)))
