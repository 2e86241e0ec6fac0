"""The tokenizer's own command: the files that NeMo reads, and one line for what is wrong."""

from pathlib import Path

import pytest

from manifests.schema import write_manifest
from manifests.tokenizer import main


@pytest.fixture
def manifest(tmp_path) -> Path:
    path = tmp_path / "train.json"
    texts = ["the cat sat on the mat", "the dog ran to the cat", "a bat and a rat sat and ran"]
    write_manifest(path, [{"audio_filepath": "/a.wav", "duration": 1.0, "text": text} for text in texts])
    return path


def test_a_folder_as_nemo_reads_it(manifest, tmp_path, capsys):
    out = tmp_path / "deep" / "tokenizer"
    assert main([str(manifest), "--out", str(out), "--vocab", "32"]) == 0
    size = int(capsys.readouterr().out.split()[-2])
    assert sorted(path.name for path in out.iterdir()) == ["tokenizer.model", "tokenizer.vocab", "vocab.txt"]
    # The unknown token is not among the lines of vocab.txt.
    assert len((out / "vocab.txt").read_text().splitlines()) == size - 1 and 20 < size <= 32


@pytest.mark.parametrize("out", ["file", "file/tokenizer", "/proc/nowhere/tokenizer"])
def test_a_place_that_cannot_be_written_is_one_line(manifest, tmp_path, capsys, out):
    (tmp_path / "file").write_text("in the way")
    assert main([str(manifest), "--out", str(tmp_path / out), "--vocab", "32"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: --out {tmp_path / out}: cannot be written: ") and error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "in the way"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "train.json"]
