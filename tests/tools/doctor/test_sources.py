"""Data as NeMo reads it: input_cfg, fields under other names, rows of tars, one channel of several. No torch."""

import numpy as np
import pytest
import soundfile
import yaml

from tests.recipes import tiny
from tools.doctor.configs import load_config
from tools.doctor.engine import examine
from tools.doctor.sources import Source

LABELS = [" ", *"abcdefghijklmnopqrstuvwxyz'"]
FAMILIES = ["data", "audio", "pairs"]
PARTLY = "data, audio, pairs: a part of the train data is no manifest"


def spoken(folder, count=24):
    """Dull noise with gaps, as long as its text takes to say."""
    rows = []
    for i in range(count):
        text = " ".join("the cat sat on a mat and then it ran".split()[: 2 + i % 8])
        seconds = round(0.4 + len(text) / 20, 2)
        draw = np.random.default_rng(i)
        x = np.convolve(draw.standard_normal(round(seconds * 16000)), np.full(6, 0.05), "same")
        x *= np.arange(len(x)) // 2000 % 3 > 0
        soundfile.write(folder / f"u{i}.wav", x, 16000)
        rows.append({"audio_filepath": str(folder / f"u{i}.wav"), "duration": round(len(x) / 16000, 4), "text": text})
    return rows


def model(**train_ds):
    return {"model": {"labels": LABELS, "train_ds": train_ds}}


def of(config):
    return examine(config=config, families=FAMILIES)


def test_manifests_of_input_cfg_are_found_at_any_depth(tmp_path):
    (tmp_path / "more.yaml").write_text(yaml.safe_dump([
        {"type": "nemo", "manifest_filepath": "c.json", "text_field": "said"},
        {"type": "lhotse_shar", "shar_path": "/there"}]))
    groups = [{"type": "nemo_tarred", "manifest_filepath": [["a_{0..1}.json", 0.5]], "tarred_audio_filepaths": "a_{0..1}.tar"},
              {"type": "group", "input_cfg": [{"type": "multi_speaker_simulator", "manifest_filepath": "b.json"},
                                              {"type": "nemo_tarred", "manifest_filepath": "pipe:ais get x"}]},
              {"type": "group", "input_cfg": str(tmp_path / "more.yaml")}]
    found, other = load_config(model(use_lhotse=True, input_cfg=groups, lang_field="language")).sources("train")
    assert found == [Source("a_{0..1}.json", "lhotse", "text", "language", True), Source("b.json", "lhotse", "text", "language"),
                     Source("c.json", "lhotse", "said", "language")]
    assert other == ["pipe:ais get x", "shar_path=/there"]


@pytest.mark.parametrize("change, ids", [(str, []), (str.upper, ["data-upper-case"])])
def test_the_data_of_input_cfg_are_looked_at(tmp_path, change, ids):
    path = tiny.write_rows(tmp_path / "t.json", [{**row, "text": change(row["text"])} for row in spoken(tmp_path)])
    groups = [{"type": "nemo", "manifest_filepath": str(path)}, {"type": "lhotse_shar", "shar_path": "/there"}]
    report = of(model(use_lhotse=True, input_cfg=groups))
    assert report.ids == ids and any(line.startswith(PARTLY) for line in report.not_examined)


@pytest.mark.parametrize("train_ds, said", [
    ({"use_lhotse": True, "shar_path": "/there"}, "names no manifest that can be read (shar_path=/there)"),
    ({"use_lhotse": True, "cuts_path": "c.jsonl.gz"}, "(cuts_path=c.jsonl.gz)"),
    ({"use_lhotse": True, "manifest_filepath": "/there/m.jsonl.gz"}, "(/there/m.jsonl.gz)"),
    ({"manifest_filepath": None}, "(input_cfg/shar/cuts)"),
])
def test_data_that_are_not_read_are_said_to_be_so(train_ds, said):
    report = of(model(**train_ds))
    assert any("data, audio, pairs: the train section" in line and said in line and line.endswith("--train")
               for line in report.not_examined), report.not_examined


def test_where_the_manifest_is_looked_at_nothing_of_that_is_said(tmp_path):
    path = str(tiny.write_rows(tmp_path / "t.json", spoken(tmp_path)))
    for report in (of(model(manifest_filepath=path)), examine(config=model(), manifests={"train": path}, families=FAMILIES)):
        assert report.findings == [] and not any("the train section" in line for line in report.not_examined)


def renamed(row, **names):
    return {names.get(key, key): value for key, value in row.items()}


def test_fields_under_the_names_that_nemos_parser_knows(tmp_path):
    rows = []
    for i, row in enumerate(spoken(tmp_path)):
        if i % 3 == 0:
            (tmp_path / f"t{i}.txt").write_text(row.pop("text") + "\n")
            row["text_filepath"] = str(tmp_path / f"t{i}.txt")
        rows.append(renamed(row, **({"audio_filepath": "audio_filename"}, {"text": "normalized_text"}, {})[i % 3]))
    report = examine(manifests={"train": str(tiny.write_rows(tmp_path / "t.json", rows))}, families=FAMILIES)
    assert report.findings == [] and "data-empty-text" in report.ruled_out
    # lhotse's reader knows none of them, and ours takes nothing for granted
    path = str(tmp_path / "t.json")
    assert "data-manifest-broken" in of(model(use_lhotse=True, manifest_filepath=path)).ids
    assert of({**model(manifest_filepath=path), "training": {"epochs": 1}}).exit_code == 1


def test_the_field_of_text_that_lhotse_is_told(tmp_path):
    rows = [{**renamed(row, text="answer"), "text": ""} for row in spoken(tmp_path)]
    path = str(tiny.write_rows(tmp_path / "t.json", rows))
    assert of(model(use_lhotse=True, manifest_filepath=path, text_field="answer")).findings == []
    assert of(model(use_lhotse=True, manifest_filepath=path)).ids == ["data-empty-text"]


def test_rows_that_lhotse_skips_are_none(tmp_path):
    rows = spoken(tmp_path)
    lost = [{"audio_filepath": "/nowhere.wav", "duration": 1.0, "text": "lost", "_skipme": True}]
    path = str(tiny.write_rows(tmp_path / "t.json", rows + lost))
    assert of(model(use_lhotse=True, manifest_filepath=path)).findings == []
    assert of(model(manifest_filepath=path)).ids == ["data-missing-audio"]


@pytest.mark.parametrize("options, there", [
    ({"use_lhotse": True, "tarred_audio_filepaths": "audio_{0..1}.tar"}, True),
    ({"is_tarred": True, "tarred_audio_filepaths": "audio_{0..1}.tar"}, True), ({}, False),
])
def test_rows_of_tars_that_do_not_say_their_shard(tmp_path, options, there):
    rows = [{**row, "audio_filepath": f"u{i}.flac"} for i, row in enumerate(spoken(tmp_path))]
    report = of(model(manifest_filepath=str(tiny.write_rows(tmp_path / "t.json", rows)), **options))
    assert report.ids == ([] if there else ["data-missing-audio"])
    assert there == any("24 rows is in tar files" in line for line in report.not_examined)


def stereo(folder, rows, silent):
    for row in rows:
        x, rate = soundfile.read(row["audio_filepath"])
        both = np.stack([x, x], axis=1)
        both[:, silent] = 0
        soundfile.write(row["audio_filepath"], both, rate)
    return str(tiny.write_rows(folder / "t.json", rows))


@pytest.mark.parametrize("options, silent", [
    ({"channel_selector": 1}, True), ({"channel_selector": 0}, False), ({"channel_selector": "average"}, False),
    ({"channel_selector": 1, "use_lhotse": True}, True), ({"channel_selector": "side", "use_lhotse": True}, True),
])
def test_the_channel_that_is_selected_is_the_one_that_is_heard(tmp_path, options, silent):
    path = stereo(tmp_path, [{**row, "side": 1} for row in spoken(tmp_path)], silent=1)
    report = of(model(manifest_filepath=path, **options))
    found = [finding for finding in report.findings if finding.id == "data-silence"]
    assert [finding.weight for finding in found] == ["prevents"] * silent
    assert not silent or "It is channel 1" in found[0].symptom and "model.train_ds.channel_selector" in found[0].fix[0]


def test_a_model_is_made_to_hear_the_channel_that_is_selected(tmp_path):
    from tools.doctor.audio import read_at

    draw = np.random.default_rng(0).standard_normal((8000, 2)).astype(np.float32) * 0.1
    soundfile.write(tmp_path / "a.wav", draw, 16000, subtype="FLOAT")
    row = {"audio_filepath": str(tmp_path / "a.wav"), "duration": 0.5, "text": "a", "_channel": 1}
    assert np.array_equal(read_at(row, 16000), draw[:, 1]) and len(read_at(row, 8000)) == 4000


@pytest.mark.parametrize("rate, highest, heard, said", [
    (48000, 13000, 16000, None), (48000, 3400, 16000, "model.sample_rate=8000"), (16000, 3400, 16000, "model.sample_rate=8000"),
    (8000, 4000, 16000, None),
])
def test_the_upper_band_is_that_of_the_model(tmp_path, rate, highest, heard, said):
    rows = []
    for i in range(6):
        x = np.random.default_rng(i).standard_normal(2 * rate) * 0.1
        spectrum = np.fft.rfft(x)
        spectrum[np.fft.rfftfreq(len(x), 1 / rate) > highest] = 0
        x = np.fft.irfft(spectrum, len(x)) * (np.arange(len(x)) // (rate // 8) % 3 > 0)
        soundfile.write(tmp_path / f"u{i}.wav", x, rate)
        rows.append({"audio_filepath": str(tmp_path / f"u{i}.wav"), "duration": 2.0, "text": f"some words here {'abcdef'[i]}"})
    config = {"model": {"labels": LABELS, "sample_rate": heard}}
    report = examine(config=config, manifests={"train": str(tiny.write_rows(tmp_path / "t.json", rows))}, families=["audio"])
    fixes = [finding.fix[0] for finding in report.findings if "upper half" in finding.symptom]
    assert len(fixes) == bool(said) and (not said or said in fixes[0])
