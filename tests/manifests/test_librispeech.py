"""A native tree to manifests: exact, in order, the same for any number of workers, and clear on a broken tree."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from manifests import librispeech
from manifests.librispeech import CorpusError, build_rows, main
from manifests.schema import read_manifest, resolve_audio

SPEAKERS = """; id | sex | subset | minutes | name
7    | F | train-tiny | 1.0 | Some | One
10   | M | train-tiny | 1.0 | Zoë Other
"""


def write_flac(path: Path, samples: int, rate: int = 16000) -> None:
    noise = np.random.default_rng(samples).normal(scale=0.1, size=samples)
    soundfile.write(path, noise, rate, format="FLAC", subtype="PCM_16")


def add_chapter(subset: Path, speaker: str, chapter: str, count: int = 3) -> Path:
    folder = subset / speaker / chapter
    folder.mkdir(parents=True)
    lines = []
    for number in range(count):
        utterance = f"{speaker}-{chapter}-{number:04}"
        write_flac(folder / f"{utterance}.flac", 3000 + 7 * number)
        lines.append(f"{utterance} IT'S  LINE NUMBER {'ONE TWO THREE FOUR FIVE'.split()[number]}\n")
    (folder / f"{speaker}-{chapter}.trans.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def tree(tmp_path) -> Path:
    """Two subsets; speakers 10, 7 and 8, of whom SPEAKERS.TXT knows two."""
    root = tmp_path / "LibriSpeech"
    for speaker, chapter in (("10", "2"), ("10", "11"), ("7", "5"), ("8", "1")):
        add_chapter(root / "train-tiny", speaker, chapter)
    add_chapter(root / "dev-tiny", "7", "6", 1)
    (root / "SPEAKERS.TXT").write_text(SPEAKERS, encoding="utf-8")
    return root


def run(*args) -> int:
    return main([str(arg) for arg in args])


def test_rows_are_what_the_tree_holds(tree):
    rows = build_rows(tree, "train-tiny")
    assert [row["utterance"] for row in rows] == [
        f"{chapter}-{number:04}" for chapter in ("10-11", "10-2", "7-5", "8-1") for number in range(3)
    ]
    assert rows[1] == {
        "audio_filepath": str(tree / "train-tiny/10/11/10-11-0001.flac"),
        "duration": 3007 / 16000,
        "sampling_rate": 16000,
        "text": "it's line number two",
        "speaker": "10",
        "chapter": "11",
        "utterance": "10-11-0001",
        "gender": "M",
    }
    assert [row.get("gender") for row in rows] == ["M"] * 6 + ["F"] * 3 + [None] * 3


@pytest.mark.parametrize("nested", [False, True])
def test_one_file_a_subset_and_nothing_else(tree, tmp_path, nested, capsys):
    out = tmp_path / "out"
    src = tree.parent if nested else tree
    before = sorted(tmp_path.rglob("*"))
    assert run(src, "--out", out, "--subsets", "train-tiny", "dev-tiny", "train-tiny") == 0
    assert sorted(os.listdir(out)) == ["dev-tiny.json", "train-tiny.json"]
    assert sorted(path for path in tmp_path.rglob("*") if out not in (path, *path.parents)) == before
    assert len(read_manifest(out / "train-tiny.json")) == 12
    assert "train-tiny: 12 utterances, 0.00 h, 3 speakers" in capsys.readouterr().out


def test_bytes_do_not_hang_on_workers_runs_or_how_the_folder_is_spelled(tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tree.parent)
    found = set()
    for number, (src, workers) in enumerate([(tree, 1), (tree, 1), (tree, 2), ("LibriSpeech", 5), (f"{tree}/../", 3)]):
        out = tmp_path / f"out{number}"
        assert run(src, "--out", out, "--subsets", "train-tiny", "--workers", workers) == 0
        found.add((out / "train-tiny.json").read_bytes())
    assert len(found) == 1


def test_the_order_does_not_come_from_the_file_system(tree, monkeypatch):
    expected = build_rows(tree, "train-tiny")
    scandir = os.scandir
    monkeypatch.setattr(librispeech.os, "scandir", lambda path: reversed(list(scandir(path))))
    assert build_rows(tree, "train-tiny") == expected


def test_relative_paths_lead_to_the_audio_through_a_link_too(tree, tmp_path):
    (tmp_path / "far" / "away").mkdir(parents=True)
    out = tmp_path / "link"
    out.symlink_to(tmp_path / "far" / "away")
    assert run(tree, "--out", out, "--subsets", "train-tiny", "--relative") == 0
    for row in read_manifest(out / "train-tiny.json"):
        assert not os.path.isabs(row["audio_filepath"])
        assert os.path.isfile(resolve_audio(row, out / "train-tiny.json"))
    assert read_manifest(out / "train-tiny.json")[0]["audio_filepath"].startswith("../../LibriSpeech/train-tiny/10/11/")


def test_ids_choose_and_missing_ones_are_reported(tree, tmp_path, capsys):
    ids = tmp_path / "some.ids"
    ids.write_text("# chosen\n8-1-0002\r\n\n10-2-0000\n99-9-0000\n")
    # What is not chosen may be broken.
    (tree / "train-tiny/7/5/7-5-0001.flac").write_bytes(b"")
    assert run(tree, "--out", tmp_path, "--subsets", "train-tiny", "--ids", ids) == 0
    assert [row["utterance"] for row in read_manifest(tmp_path / "train-tiny.json")] == ["10-2-0000", "8-1-0002"]
    told = capsys.readouterr().err
    assert f"{ids}:5: 1 of 3 ids are not in train-tiny, 99-9-0000 the first of them" in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no utterance id"),
        ("7-5-0000 SOME TEXT\n", ":1: '7-5-0000 SOME TEXT' is not one utterance id"),
        ("1-1-0000\n", "none of its ids is in train-tiny: leave train-tiny out"),
        (None, "cannot read the list of ids"),
    ],
)
def test_a_bad_list_of_ids_is_named(tree, tmp_path, capsys, text, words):
    ids = tmp_path / "some.ids"
    if text is not None:
        ids.write_text(text)
    assert run(tree, "--out", tmp_path / "out", "--subsets", "train-tiny", "--ids", ids) == 1
    error = capsys.readouterr().err
    assert str(ids) in error and words in error
    assert not (tmp_path / "out").exists()


CHAPTER = "train-tiny/10/2"


def _truncate(tree, name, keep):
    path = tree / CHAPTER / name
    path.write_bytes(path.read_bytes()[:keep])


def _transcripts(tree, text):
    (tree / CHAPTER / "10-2.trans.txt").write_bytes(text)


BREAKS = {
    "missing flac": (
        lambda tree: (tree / CHAPTER / "10-2-0001.flac").unlink(),
        "10-2.trans.txt:2: no 10-2-0001.flac beside it",
    ),
    "no transcript": (
        lambda tree: write_flac(tree / CHAPTER / "10-2-0009.flac", 400),
        "10-2-0009.flac: no line for it in a trans.txt",
    ),
    "no transcripts at all": (
        lambda tree: (tree / CHAPTER / "10-2.trans.txt").unlink(),
        "10-2-0000.flac: no line for it in a trans.txt",
    ),
    "zero bytes": (lambda tree: _truncate(tree, "10-2-0001.flac", 0), "10-2-0001.flac: is empty (0 bytes)"),
    "cut header": (lambda tree: _truncate(tree, "10-2-0001.flac", 20), "10-2-0001.flac: is cut off within its header"),
    "cut audio": (lambda tree: _truncate(tree, "10-2-0001.flac", 100), "10-2-0001.flac: is cut off"),
    "no samples": (
        lambda tree: soundfile.write(tree / CHAPTER / "10-2-0001.flac", np.zeros(0), 16000),
        "10-2-0001.flac: ",
    ),
    "wav inside": (
        lambda tree: soundfile.write(tree / CHAPTER / "10-2-0001.flac", np.zeros(900), 16000, format="WAV"),
        "10-2-0001.flac: is not FLAC: it starts with b'RIFF' (a WAV file)",
    ),
    "folder of that name": (
        lambda tree: ((tree / CHAPTER / "10-2-0001.flac").unlink(), (tree / CHAPTER / "10-2-0001.flac").mkdir()),
        "10-2-0001.flac: cannot be read: Is a directory",
    ),
    "id without text": (
        lambda tree: _transcripts(tree, b"10-2-0000 A\n10-2-0001\n"),
        "10-2.trans.txt:2: has id 10-2-0001 and no transcript",
    ),
    "text without id": (
        lambda tree: _transcripts(tree, b"10-2-0000 A\n\nHELLO THERE\n"),
        "10-2.trans.txt:3: starts with 'HELLO', not with an id of this folder (10-2-...)",
    ),
    "id of another chapter": (lambda tree: _transcripts(tree, b"10-11-0000 A\n"), "starts with '10-11-0000'"),
    "id twice": (
        lambda tree: _transcripts(tree, b"10-2-0000 A\n10-2-0001 B\n10-2-0000 C\n"),
        "10-2.trans.txt:3: id 10-2-0000 stands on line 1 already",
    ),
    "id in two files": (
        lambda tree: (tree / CHAPTER / "x.trans.txt").write_text("10-2-0002 D\n"),
        "x.trans.txt:1: id 10-2-0002 stands in another trans.txt",
    ),
    "not UTF-8": (lambda tree: _transcripts(tree, b"10-2-0000 A\n10-2-0001 \xff\n"), "10-2.trans.txt:2: is not UTF-8"),
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_tree_is_refused_whole(tree, tmp_path, capsys, name, workers):
    damage, words = BREAKS[name]
    damage(tree)
    out = tmp_path / "out"
    assert run(tree, "--out", out, "--subsets", "dev-tiny", "train-tiny", "--workers", workers) == 1
    error = capsys.readouterr().err
    # The line that names the file comes with its full path.
    assert any(words in line and str(tree / CHAPTER) in line for line in error.splitlines()), error
    assert not out.exists()


def test_all_problems_are_counted_and_the_first_listed(tree):
    for path in tree.glob("train-tiny/*/*/*.flac"):
        path.write_bytes(b"")
    add_chapter(tree / "train-tiny", "5", "5", 5)
    for number in range(40):
        (tree / "train-tiny/5/5" / f"5-5-1{number:03}.flac").touch()
    with pytest.raises(CorpusError) as caught:
        build_rows(tree, "train-tiny")
    lines = str(caught.value).splitlines()
    assert "52 problem(s), nothing written" in lines[0]
    assert len(lines) == 22 and lines[-1] == "... and 32 more"


@pytest.mark.parametrize(
    ("src", "subset", "words"),
    [
        ("LibriSpeech", "train-tny", "'train-tny': did you mean 'train-tiny'? there are: dev-tiny, train-tiny"),
        ("LibriSpeech", "../LibriSpeech/train-tiny", "no subset '../LibriSpeech/train-tiny'"),
        ("LibriSpeech/train-tiny/10/2", "train-tiny", "holds no subset folders"),
        ("nowhere", "train-tiny", "nowhere: no such folder"),
        ("LibriSpeech", "empty", "empty: holds no <speaker>/<chapter> folders"),
        ("LibriSpeech", "hollow", "hollow: holds no utterances"),
    ],
)
def test_a_subset_that_is_not_there_is_named(tree, src, subset, words):
    if subset == "empty":
        (tree / "empty").mkdir()
    if subset == "hollow":
        (tree / "hollow/1/2").mkdir(parents=True)
    with pytest.raises(CorpusError) as caught:
        build_rows(tree.parent / src, subset)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_broken_speakers_file_is_named(tree):
    (tree / "SPEAKERS.TXT").write_text(SPEAKERS + "12 M train\n")
    with pytest.raises(CorpusError, match=r"SPEAKERS.TXT:4: '12 M train' is not `id \| F or M"):
        build_rows(tree, "dev-tiny")
    (tree / "SPEAKERS.TXT").unlink()
    assert "gender" not in build_rows(tree, "dev-tiny")[0]


def test_hidden_files_and_folders_are_none_of_the_corpus(tree):
    expected = build_rows(tree, "train-tiny")
    (tree / CHAPTER / "._10-2-0000.flac").write_bytes(b"mac")
    (tree / CHAPTER / "._10-2.trans.txt").write_bytes(b"\xff")
    (tree / "train-tiny/.completed").touch()
    (tree / "train-tiny/.cache/1").mkdir(parents=True)
    (tree / "train-tiny/README.TXT").touch()
    assert build_rows(tree, "train-tiny") == expected


def test_a_file_without_its_length_gets_it_from_its_last_frame(tree):
    path = tree / CHAPTER / "10-2-0001.flac"
    raw = bytearray(path.read_bytes())
    raw[21] &= 0xF0
    raw[22:26] = bytes(4)
    path.write_bytes(raw)
    rows = {row["utterance"]: row for row in build_rows(tree, "train-tiny")}
    assert rows["10-2-0001"]["duration"] == 3007 / 16000


def test_a_failed_run_keeps_the_old_manifest(tree, tmp_path):
    assert run(tree, "--out", tmp_path, "--subsets", "train-tiny") == 0
    before = (tmp_path / "train-tiny.json").read_bytes()
    _truncate(tree, "10-2-0001.flac", 100)
    assert run(tree, "--out", tmp_path, "--subsets", "train-tiny") == 1
    assert (tmp_path / "train-tiny.json").read_bytes() == before


def test_real_speech(librispeech_sample, tmp_path, capsys):
    assert run(librispeech_sample, "--out", tmp_path, "--subsets", "train-clean-5", "train-clean-100") == 0
    shown = capsys.readouterr().out
    assert "(a part: 55 of 1519 utterances)" in shown and "(a part: 28 of 28539 utterances)" in shown
    rows = read_manifest(tmp_path / "train-clean-5.json") + read_manifest(tmp_path / "train-clean-100.json")
    assert len(rows) == 83
    for row in rows:
        info = soundfile.info(row["audio_filepath"])
        assert row["duration"] == info.frames / 16000 and row["sampling_rate"] == 16000
        speaker, chapter, _ = row["utterance"].split("-")
        assert (row["speaker"], row["chapter"]) == (speaker, chapter)
        assert Path(row["audio_filepath"]).name == f"{row['utterance']}.flac"
        assert row["gender"] in ("F", "M")
        trans = Path(row["audio_filepath"]).with_name(f"{speaker}-{chapter}.trans.txt").read_text()
        assert f"{row['utterance']} {row['text'].upper()}\n" in trans
    by_id = {row["utterance"]: row for row in rows}
    assert by_id["118-47824-0002"]["duration"] == 3.965
    assert by_id["118-47824-0002"]["gender"] == "M"


def test_nothing_heavy_is_imported(tree, tmp_path):
    code = (
        "import sys; from manifests.librispeech import main; assert main(sys.argv[1:]) == 0;"
        "heavy = {'torch', 'nemo', 'lhotse', 'numpy', 'soundfile', 'recipes', 'tools'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    args = [str(tree), "--out", str(tmp_path / "out"), "--subsets", "train-tiny"]
    subprocess.run([sys.executable, "-c", code, *args], check=True, cwd=Path(__file__).parents[2])


def test_the_command_line_as_documented(tree, tmp_path):
    command = [sys.executable, "-m", "manifests.librispeech", str(tree), "--out", str(tmp_path / "out")]
    command += ["--subsets", "train-tiny", "dev-tiny"]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2], capture_output=True)
    lines = (tmp_path / "out/dev-tiny.json").read_text().splitlines()
    assert [json.loads(line)["utterance"] for line in lines] == ["7-6-0000"]
