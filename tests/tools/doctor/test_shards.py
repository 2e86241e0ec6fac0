"""Manifests whose audio is in tar files: ours, read at their place, and NeMo's, of which it is said what was not."""

import json
import shutil

import numpy as np
import pytest
import soundfile

from manifests.shards import write_shards
from manifests.shards_format import COMBINED, tar_name
from tools.doctor.engine import examine
from tools.doctor.subject import expanded

RATE = 16000
FAMILIES = ["data", "audio"]


def corpus(folder, change=lambda x: x, count=24, name="train"):
    """A manifest of `count` dull noises with gaps, whose samples went through `change`."""
    generator = np.random.default_rng(len(name))
    rows = []
    (folder / name).mkdir(parents=True)
    for i in range(count):
        noise = np.convolve(generator.standard_normal(RATE * 2), np.full(8, 0.03), "same")
        x = noise * (np.arange(RATE * 2) // 4000 % 3 > 0)
        path = folder / name / f"{name}-{i}.flac"
        soundfile.write(path, change(x), RATE)
        text = f"{name} words {chr(97 + i)}"
        rows.append({"audio_filepath": str(path), "duration": 2.0, "text": text})
    path = folder / f"{name}.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sharded(folder, manifest, out="shards", **more):
    write_shards([manifest], folder / out, hours=0.005, **more)
    return folder / out / COMBINED


def found(**manifests):
    return examine(manifests=manifests, families=FAMILIES)


def test_samples_in_shards_are_looked_at_like_those_of_files(tmp_path):
    report = found(train=sharded(tmp_path, corpus(tmp_path)))
    assert report.findings == [] and report.exit_code == 0
    assert {"data-silence", "data-scale", "data-missing-audio", "data-channels"} <= set(report.ruled_out)
    silent = found(train=sharded(tmp_path, corpus(tmp_path, lambda x: 0 * x, name="silent"), "silent_shards"))
    assert silent.ids == ["data-silence"] and silent.exit_code == 1
    assert "audio_" in silent.findings[0].symptom


def test_a_shard_that_was_cut_off_or_is_of_another_run(tmp_path):
    manifest = corpus(tmp_path)
    combined = sharded(tmp_path, manifest)
    tar = combined.parent / tar_name(0)
    tar.write_bytes(tar.read_bytes()[:5000])
    first = found(train=combined).findings[0]
    assert (first.id, first.weight) == ("data-missing-audio", "prevents") and tar.name in first.symptom
    other = sharded(tmp_path, manifest, "again", seed=5)
    shutil.copy(combined, other)
    first = found(train=other).findings[0]
    assert first.id == "data-missing-audio" and "not of one run" in first.symptom and first.evidence["share"] > 0.5


def test_rows_of_shards_that_lie_about_their_length(tmp_path):
    combined = sharded(tmp_path, corpus(tmp_path))
    rows = [json.loads(line) for line in combined.read_text().splitlines()]
    combined.write_text("".join(json.dumps({**row, "duration": 3.5}) + "\n" for row in rows))
    first = found(train=combined).findings[0]
    assert (first.id, first.weight) == ("data-duration-wrong", "prevents") and "2.00 s in the tar" in first.symptom


def test_the_same_bytes_in_train_and_under_another_name_in_a_test_set(tmp_path):
    manifest = corpus(tmp_path)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()][:6]
    for i, row in enumerate(rows):
        copy = shutil.copy(row["audio_filepath"], tmp_path / f"other-{i}.flac")
        row["audio_filepath"] = str(copy)
    test = tmp_path / "test.json"
    test.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = found(train=sharded(tmp_path, manifest), test=test)
    assert "data-leakage" in report.ids and "6 of 6" in report.findings[report.ids.index("data-leakage")].symptom


def test_of_nemos_own_shards_it_is_said_what_was_not_examined(tmp_path, monkeypatch):
    combined = sharded(tmp_path, corpus(tmp_path))
    keep = ("audio_filepath", "duration", "text", "shard_id")
    for shard, path in enumerate(sorted((combined.parent / "sharded_manifests").glob("*.json"))):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({k: v for k, v in row.items() if k in keep}) + "\n" for row in rows))
    report = found(train=str(combined.parent / "sharded_manifests" / f"manifest__OP_0..{shard}_CL_.json"))
    assert report.findings == [] and report.exit_code == 0
    said = [line for line in report.not_examined if "no tar_offset" in line]
    assert any(line.startswith("data: Every audio file is there") and "24 rows" in line for line in said)
    assert sum(line.startswith("audio:") for line in said) == 5 and "data-silence" not in report.ruled_out
    monkeypatch.chdir(tmp_path)  # a path as one types it
    typed = f"./x/../{combined.parent.name}/sharded_manifests/manifest_0.json"
    (tmp_path / "x").mkdir()
    assert found(train=typed).findings == []


@pytest.mark.parametrize("path, paths", [
    ("a_{0..2}.json", ["a_0.json", "a_1.json", "a_2.json"]), ("a__OP_7..8_CL_.json", ["a_7.json", "a_8.json"]),
    ("b{0..1}/a_{0..1}.json", ["b0/a_0.json", "b0/a_1.json", "b1/a_0.json", "b1/a_1.json"]), ("a.json", ["a.json"]),
    ("a_{x..2}.json", ["a_{x..2}.json"]),
])
def test_nemos_patterns_of_shards(path, paths):
    assert expanded(path) == paths
