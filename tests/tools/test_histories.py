"""The histories: each is complete, composes and builds in both versions; one is run from end to end on real speech."""

import csv
import json
import math
from dataclasses import replace

import pytest

from manifests.schema import read_manifest, write_manifest
from recipes.config import ConfigError
from tools.doctor.finding import PAGES
from tools.histories.__main__ import main
from tools.histories.history import VERSIONS, choose, configuration, load, names, write_manifests

TINY = ("model.encoder.hidden=24", "model.encoder.rnn_hidden=24")


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """(train.json, dev.json) of real speech."""
    from manifests.librispeech import build_rows
    from tests.conftest import SHARED

    tree = SHARED / "librispeech" / "sample" / "LibriSpeech"
    if not tree.is_dir():
        pytest.skip("real LibriSpeech sample ../shared/librispeech/sample is not on this machine")
    folder = tmp_path_factory.mktemp("speech")
    rows = build_rows(tree, "train-clean-5")
    write_manifest(folder / "train.json", rows)
    write_manifest(folder / "dev.json", rows[:5])
    return folder / "train.json", folder / "dev.json"


@pytest.mark.parametrize("name", names())
def test_a_history_tells_what_was_seen_and_names_causes_of_the_catalogue(name):
    history = load(name)
    assert history.reported in "abc" and name.startswith(history.reported)
    assert all((history.title, history.saw, history.cause, history.fix, history.causes)) and history.steps > 0
    for cause in history.causes:
        assert (PAGES / f"{cause}.md").is_file(), cause


def test_each_report_has_at_least_two_histories():
    reported = [load(name).reported for name in names()]
    assert all(reported.count(letter) >= 2 for letter in "abc")


@pytest.mark.parametrize("name", names())
def test_both_versions_build_and_differ_only_as_written(name, speech, tmp_path):
    import torch
    from omegaconf import open_dict

    from recipes.train import fill_in
    from tools.histories.training import build

    history, outputs = load(name), {}
    for version in ("broken", "fixed"):
        cfg = configuration(history, version, *speech, tmp_path)
        with open_dict(cfg):
            fill_in(cfg)
            cfg.model.train_ds = cfg.model.validation_ds = None
        model = build(history, version, cfg)
        torch.manual_seed(0)
        log_probs, lengths, _ = model.eval().forward(
            input_signal=torch.randn(2, 16000), input_signal_length=torch.tensor([16000, 12000])
        )
        assert log_probs.shape[0] == 2 and 0 < int(lengths[0]) <= log_probs.shape[1]
        assert torch.allclose(log_probs.exp().sum(-1)[0], torch.ones(log_probs.shape[1]), atol=1e-4)
        outputs[version] = type(model.encoder).__name__, cfg
    assert configuration(history, "one_batch", *speech, tmp_path) is not None
    assert outputs["fixed"][0] in ("DeepSpeechEncoder", "DeepSpeech2Encoder", "ConformerEncoder")
    assert history.upper_case or outputs["fixed"][1].model != outputs["broken"][1].model


def test_the_recurrence_over_the_batch_joins_utterances_and_the_repaired_one_does_not(speech, tmp_path):
    import torch

    from tools.histories.training import build

    history = load("b1_deepspeech2_recurrence_over_batch")
    features, lengths = torch.randn(2, 80, 64), torch.tensor([64, 64])
    other = torch.cat([features[:1], torch.randn(1, 80, 64)])
    moved = {}
    for version in ("broken", "fixed"):
        cfg = configuration(history, version, *speech, tmp_path)
        cfg.model.train_ds = cfg.model.validation_ds = cfg.model.optim = None
        encoder = build(history, version, cfg).encoder.eval()
        with torch.no_grad():
            ours, theirs = (encoder(audio_signal=x, length=lengths)[0][0] for x in (features, other))
        moved[version] = float((ours - theirs).abs().max())
    assert moved["broken"] > 1e-2 and moved["fixed"] < 1e-5


def test_manifests_of_a_version(speech, tmp_path):
    capitals = load("b3_deepspeech2_capitals")
    train, _ = write_manifests(capitals, "broken", *speech, tmp_path, hours=0.02)
    rows = read_manifest(train)
    assert all(row["text"] == row["text"].upper() and 3 <= row["duration"] <= 8 for row in rows)
    train, _ = write_manifests(capitals, "fixed", *speech, tmp_path, hours=0.02)
    assert [row["text"].upper() for row in read_manifest(train)] == [row["text"] for row in rows]
    one = load("c1_conformer_noam_as_rate")
    train, dev = write_manifests(one, "broken", *speech, tmp_path, hours=1.0)
    assert 0 < len(read_manifest(train)) <= 8 and read_manifest(dev) == read_manifest(train)


def test_utterances_are_spread_over_the_manifest():
    rows = [{"duration": 4.5, "at": i} for i in range(800)]
    kept = choose(rows, hours=0.25)
    assert 198 <= len(kept) <= 200 and kept[-1]["at"] > 790 and choose(rows, 10) == rows


def test_a_run_from_end_to_end(speech, tmp_path, monkeypatch):
    import tools.histories.__main__ as command

    whole = load("a1_deepspeech_relu_recurrence")
    small = replace(whole, overrides=(*whole.overrides, "model.preprocessor.features=24"),
                    broken=(*whole.broken, *TINY), fixed=TINY)
    monkeypatch.setattr(command, "load", lambda name: small)
    train, dev = map(str, speech)
    arguments = ["run", small.name, "--data", train, "--dev", dev, "--out", str(tmp_path), "--steps", "3", "--fixed"]
    assert main([*arguments, "--seconds", "3"]) == 0
    out = tmp_path / small.name
    page = (out / "history.md").read_text()
    for part in ("As reported", "Repaired", "hypothesis", "| before |", "| during |", "| after |", small.fix[:20]):
        assert part in page, part
    with open(out / "broken.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    from recipes.monitor import COLUMNS

    assert list(rows[0]) == COLUMNS and rows[-1]["step"] == "3"
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in page

    seen = json.loads((out / "broken" / "seen.json").read_text())
    seen["doctor"] |= {"before": {"verdict": "", "findings": []}, "during": {"verdict": "as it was", "findings": []}}
    (out / "broken" / "seen.json").write_text(json.dumps(seen))
    assert main([*arguments, "--seconds", "3", "--again"]) == 0
    again = json.loads((out / "broken" / "seen.json").read_text())["doctor"]
    assert list(again) == ["before", "during", "after"] and again["before"]["verdict"]
    assert again["during"] == seen["doctor"]["during"]


def test_nan_goes_through_zero_infinity_and_clipping_into_every_parameter(speech, tmp_path):
    from tools.histories.training import train

    whole = load("a1_deepspeech_relu_recurrence")
    history = replace(whole, broken=(*whole.broken, *TINY, "model.optim.lr=1e3"))
    manifests = write_manifests(history, "one_batch", *speech, tmp_path, hours=0.02)
    seen = train(history, "one_batch", manifests, tmp_path, steps=6)
    found = seen["anatomy"]
    assert not found["log_probs_finite"] and math.isnan(float(found["loss"]))
    assert found["clip"] == 1.0 and found["gradients_broken_after_clipping"] == found["gradients"]
    assert found["parameters_broken"] == found["parameters"]


def test_bad_input_is_one_line(capsys, tmp_path):
    with pytest.raises(ConfigError, match="did you mean b3_deepspeech2_capitals"):
        load("b3_deepspeech2_capital")
    assert main(["run", names()[0], "--data", str(tmp_path / "no.json")]) == 2
    assert "no.json: no such file" in capsys.readouterr().err


def test_list_tells_every_history(capsys):
    assert main(["list"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in names()) and set(VERSIONS) == {"broken", "one_batch", "fixed"}
