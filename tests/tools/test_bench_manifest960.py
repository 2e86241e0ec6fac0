"""The dry run of a large manifest does in small what it does in large."""

import json
from pathlib import Path

import pytest

from manifests.librispeech import build_rows, list_subsets
from manifests.schema import read_manifest, write_manifest
from tools.bench import manifest960
from tools.bench.manifest960 import BUILT, DRAWN, run_part


@pytest.fixture(scope="module")
def source(librispeech_sample, tmp_path_factory) -> str:
    rows = [row for subset in list_subsets(librispeech_sample) for row in build_rows(librispeech_sample, subset)]
    path = tmp_path_factory.mktemp("source") / "real.json"
    write_manifest(path, rows)
    return str(path)


def test_each_step_sees_every_row(source, tmp_path, monkeypatch):
    monkeypatch.setattr(manifest960, "SHARDED", 30)
    said = {part: run_part(part, tmp_path, 160, source) for part in BUILT if part != "imports"}
    for part in ("simulate", "build", "read", "validate", "validate_audio", "plan"):
        assert said[part]["rows"] == 160, part
    assert said["write_shards"]["rows"] == said["verify_shards"]["rows"] == 30
    rows = read_manifest(tmp_path / "train.json")
    real = {(row["duration"], row["text"]) for row in read_manifest(source)}
    assert {(row["duration"], row["text"]) for row in rows} <= real and len({row["speaker"] for row in rows}) == 2
    assert said["build"]["hours"] == pytest.approx(sum(row["duration"] for row in rows) / 3600, abs=0.1)
    # One of eight devices: an eighth of the batches, with their audio as long as the manifest says.
    assert said["epoch"]["batches"] == said["steps"]["batches"] == said["steps_with_audio"]["batches"]
    assert said["steps"]["seconds"] == pytest.approx(said["steps_with_audio"]["seconds"], abs=1)
    assert all(one["peak_mb"] > 10 and one["wall"] >= 0 for one in said.values())


def test_the_table_is_saved_after_each_step(source, tmp_path, capsys):
    skip = [part for part in BUILT if part not in ("simulate", "build", "read")]
    out = tmp_path / "results" / "manifest960.json"
    where = ["--source", source, "--json", str(out), "--scratch", str(tmp_path)]
    arguments = ["--rows", "60", "70", *where, "--skip", *skip]
    assert manifest960.main(arguments) == 0
    saved = json.loads(out.read_text())
    assert [(part["of"], part["part"]) for part in saved["parts"]] == [
        (rows, part) for rows in (60, 70) for part in ("simulate", "build", "read")
    ]
    assert str(tmp_path) not in out.read_text() and len(list(tmp_path.iterdir())) == 1  # the trees are gone
    assert "builder: tree to manifest" in (Path(out).parent / "README.md").read_text()


def test_a_manifest_can_be_drawn_without_a_tree(source, tmp_path):
    out = tmp_path / "results" / "drawn.json"
    where = ["--source", source, "--json", str(out), "--scratch", str(tmp_path)]
    skip = [part for part in DRAWN if part not in ("draw", "read", "plan")]
    assert manifest960.main(["--rows", "300", "--drawn", *where, "--skip", *skip]) == 0
    saved = json.loads(out.read_text())["parts"]
    assert [(part["part"], part["rows"]) for part in saved] == [("draw", 300), ("read", 300), ("plan", 300)]


def test_a_source_without_audio_is_named(tmp_path, capsys):
    write_manifest(tmp_path / "m.json", [{"audio_filepath": "no.flac", "duration": 1.0, "text": "a"}])
    assert manifest960.main(["--source", str(tmp_path / "m.json")]) == 1
    assert "no audio at" in capsys.readouterr().err
