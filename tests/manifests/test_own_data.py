"""People's own tables to manifests: every form they come in, every row that is no good, and splits that stay put."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manifests.own_data import build_rows, main, split_rows, strip_punctuation
from manifests.schema import LABELS, read_manifest
from manifests.table import TableError, read_table
from manifests.text import normalize
from manifests.validate import main as check
from manifests.validate import validate

# The machine may be busy: how long an example takes says nothing.
RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Holds wavs/a.wav (1.5 s), wavs/b.flac (2 s), wavs/c.wav (0.5 s at 8000 Hz) and wavs/stereo.wav."""
    (tmp_path / "wavs").mkdir()
    chosen = np.random.default_rng(0)
    for name, shape, rate in (
        ("a.wav", 24000, 16000),
        ("b.flac", 32000, 16000),
        ("c.wav", 4000, 8000),
        ("stereo.wav", (16000, 2), 16000),
    ):
        soundfile.write(tmp_path / "wavs" / name, chosen.normal(scale=0.1, size=shape), rate)
    return tmp_path


def table(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


EXPECTED = [("wavs/a.wav", 1.5, 16000, "hello there you"), ("wavs/b.flac", 2.0, 16000, "it's me")]
FORMS = {
    "csv.csv": 'path,sentence\nwavs/a.wav,"Hello there, you"\nwavs/b.flac,It\u2019s  me\n',
    "order.csv": 'id,Transcript,age,Audio\n1,"Hello there, you",9,wavs/a.wav\n2,It\'s me,8,wavs/b.flac\n',
    "crlf_and_mark.csv": '\ufefffile,text\r\nwavs/a.wav,"Hello there, you"\r\n\r\nwavs/b.flac,It\'s me\r\n',
    "semicolons.csv": "path;text\nwavs/a.wav;Hello there, you\nwavs/b.flac;It's me\n",
    "semicolons_in_names.csv": "path,text,a;b;c\nwavs/a.wav,Hello there; you,1\nwavs/b.flac,It's me,2\n",
    "semicolons_no_header.csv": "wavs/a.wav,Hello; there; you\nwavs/b.flac,It's me\n",
    "no_header.csv": 'wavs/a.wav,"Hello there, you"\nwavs/b.flac,It\'s me',
    "quoted_newline.csv": 'path,text\nwavs/a.wav,"Hello there,\nyou"\nwavs/b.flac,It\'s me\n',
    "deepspeech.csv": "wav_filename,wav_filesize,transcript\n"
    'wavs/a.wav,48044,"hello there, you"\nwavs/b.flac,9,it\'s me\n',
    "tabs.tsv": "client_id\tpath\tsentence\nx\twavs/a.wav\tHello there, you\ny\twavs/b.flac\tIt's me\n",
    "no_header.tsv": "wavs/a.wav\tHello there, you\nwavs/b.flac\tIt's me\n",
    "array.json": '[{"path": "wavs/a.wav", "text": "Hello there, you"},\n {"text": "It\'s me", "path": "wavs/b.flac"}]',
    "lines.json": '{"audio_filepath": "wavs/a.wav", "text": "Hello there, you", "duration": 77}\n\n'
    '{"audio_filepath": "wavs/b.flac", "text": "It\'s me"}\n',
    "lines.jsonl": '{"audio": "wavs/a.wav", "text": "Hello there, you"}\n{"audio": "wavs/b.flac", "text": "It\'s me"}',
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_manifest(folder, name):
    rows, problems = build_rows(table(folder, name, FORMS[name]))
    assert problems == []
    found = [(row["audio_filepath"], row["duration"], row["sampling_rate"], row["text"]) for row in rows]
    assert found == [(str(folder / path), *rest) for path, *rest in EXPECTED]


def test_speakers_and_ids_are_kept(folder):
    path = table(folder, "x.csv", "id,speaker,path,text\n7,ann,wavs/a.wav,x\n8,,wavs/b.flac,y\n")
    rows, _ = build_rows(path)
    assert [(row.get("utterance"), row.get("speaker")) for row in rows] == [("7", "ann"), ("8", None)]
    path = table(folder, "x.json", '[{"id": 7, "speaker_id": 3, "path": "wavs/a.wav", "text": "x"}]')
    assert build_rows(path)[0][0]["speaker"] == "3"


def test_quotation_marks_in_tsv_are_characters(folder):
    path = table(folder, "x.tsv", 'path\tsentence\nwavs/a.wav\t"Hi" he said\nwavs/b.flac\t5" wide\n')
    assert [row["text"] for row in build_rows(path, punctuation=True)[0]] == ['"hi" he said', '5" wide']


def test_paths_are_relative_to_the_table_or_to_a_folder_given(folder, tmp_path, monkeypatch):
    path = table(folder, "x.csv", "path,text\na.wav,x\n")
    with pytest.raises(TableError, match=r"x.csv:2: .*a.wav: cannot be read: No such file"):
        build_rows(path)
    assert build_rows(path, audio_dir=folder / "wavs")[0][0]["audio_filepath"] == str(folder / "wavs" / "a.wav")
    monkeypatch.chdir(folder.parent)
    path = table(folder, "x.csv", f"path,text\n../{folder.name}/wavs/a.wav,x\n{folder}/wavs/b.flac,y\n")
    assert [Path(row["audio_filepath"]).name for row in build_rows(os.path.relpath(path))[0]] == ["a.wav", "b.flac"]


BAD_TABLES = {
    "empty": ("x.csv", "", "x.csv:1: holds no rows"),
    "header only": ("x.csv", "path,text\n", "x.csv:1: holds no rows"),
    "no text column": ("x.csv", "path,age,x\na,1,2\n", "x.csv:1: no column of texts in ['path', 'age', 'x']"),
    "no path column": ("x.csv", "who,text\na,b\n", "x.csv:1: no column of paths"),
    "bar in a name": ("x.csv", "path,age,x|y\na,1,2\n", "x.csv:1: no column of texts in ['path', 'age', 'x|y']"),
    "one column": ("x.csv", "hello\n", "x.csv:1: no column of paths"),
    "three without header": ("x.csv", "a.wav,b,c\n", "x.csv:1: no column of paths"),
    "comma in text": ("x.csv", "path,text\na.wav,hi, you\n", "x.csv:2: has 3 cells where 2 are expected"),
    "short row": ("x.csv", "path,text\na.wav,hi\nb.wav\n", "x.csv:3: has 1 cells"),
    "open quote": ("x.csv", 'path,text\na.wav,"hi\nb.wav,you\n', "is not CSV"),
    "zero byte": ("x.csv", "path,text\na.wav,h\0i\n", "x.csv:2: "),
    "latin-1": ("x.csv", "path,text\na.wav,x\nb.wav,caf\xe9\n".encode("latin-1"), "x.csv:3: is not UTF-8"),
    "kind": ("x.xlsx", "path,text\n", "x.xlsx: ends with '.xlsx': give a .csv"),
    "not json": ("x.json", '[{"path": "a",\n "text" "b"}]', "x.json:2: is not JSON"),
    "cut array": ("x.json", '[{"path": "a", "text": "b"},\n', "x.json:2: is not JSON"),
    "no comma": ("x.json", '[{"path": "a", "text": "b"}\n{"path": "a"}]', "x.json:2: is not JSON, a comma"),
    "cut line": ("x.jsonl", '{"path": "a", "text": "b"}\n{"path": "a", "te', "x.jsonl:2: is not JSON"),
    "after array": ("x.json", '[{"path": "a", "text": "b"}]\n\nand more', "x.json:3: 'and more' follows the array"),
    "two arrays": ("x.json", '[{"path": "a", "text": "b"}] [{}]', "x.json:1: '[{}]' follows the array"),
    "empty json": ("x.json", "[]", "x.json:1: holds no rows"),
    "not objects": ("x.json", '[{"path": "a", "text": "b"},\n\n["a", "b"]]', "x.json:3: is ['a', 'b'], not an object"),
    "no text field": ("x.json", '{"path": "a", "words": "b"}', "x.json:1: no 'text' in"),
    "deep": ("x.json", "[" * 100_000, "x.json:1: cannot be read as JSON"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_tables_are_named(folder, name, capsys):
    file, text, words = BAD_TABLES[name]
    path = table(folder, file, text)
    out = folder / "out" / "m.json"
    assert main([str(path), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert words in error, error
    assert error.count("\n") <= 2 and not out.parent.exists()


BAD_ROWS = {
    "missing": ("wavs/no.wav,x", "cannot be read: No such file"),
    "folder": ("wavs,x", "cannot be read: Is a directory"),
    "no path": (",x", "audio is '': give a path"),
    "no text": ("wavs/b.flac,  ", "text is '  ': give a transcript"),
    "stereo": ("wavs/stereo.wav,x", "has 2 channels: mix it down to one"),
    "not audio": ("bad.csv,x", "no audio that libsndfile reads"),
    "twice": ("./wavs/a.wav,x", "stands on line 2 already"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_named_and_nothing_is_written(folder, name, capsys):
    row, words = BAD_ROWS[name]
    path = table(folder, "bad.csv", f"path,text\nwavs/a.wav,hello\n{row}\nwavs/c.wav,yes\n")
    out = folder / "out.json"
    assert main([str(path), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert "1 of 3 rows are bad, nothing written (--skip-bad" in error
    assert f"{path}:3: " in error and words in error
    assert not out.exists()
    assert main([str(path), "--out", str(out), "--skip-bad"]) == 0
    assert f"left out: {path}:3: " in capsys.readouterr().err
    assert [row["text"] for row in read_manifest(out)] == ["hello", "yes"]


def test_rows_of_the_wrong_type_are_named(folder):
    items = ['{"path": 5, "text": "x"}', '{"path": "wavs/a.wav", "text": null}']
    items += ['{"path": "wavs/a.wav", "text": "\\ud800"}', '{"path": "a\\u0000", "text": "x"}']
    path = table(folder, "x.json", "[{}]".format(",\n".join(items)))
    with pytest.raises(TableError) as caught:
        build_rows(path, skip_bad=True)
    lines = str(caught.value).splitlines()
    assert [line.partition(": ")[0] for line in lines[1:]] == [f"{path}:{number}" for number in (1, 2, 3, 4)]
    assert "audio is 5" in lines[1] and "text is None" in lines[2] and "lone surrogate" in lines[3]


def test_many_bad_rows_are_counted_and_the_first_listed(folder):
    path = table(folder, "x.csv", "path,text\n" + "".join(f"no{n}.wav,x\n" for n in range(50)))
    with pytest.raises(TableError) as caught:
        build_rows(path)
    lines = str(caught.value).splitlines()
    assert "50 of 50 rows are bad" in lines[0] and lines[-1] == "... and 30 more" and len(lines) == 22


def test_characters_outside_the_labels_and_other_rates_are_told(folder, capsys):
    path = table(folder, "x.csv", 'path,text\nwavs/a.wav,"Well, 2 it\'s - well-known!"\nwavs/c.wav,\u201cyes\u201d\n')
    out = folder / "m.json"
    assert main([str(path), "--out", str(out)]) == 0
    assert [row["text"] for row in read_manifest(out)] == ["well 2 it's well known", "yes"]
    told = capsys.readouterr()
    assert "training refuses a text: '2':1, first in \"well 2 it's well known\": spell them out" in told.err
    assert "1 files have 8000 Hz" in told.out
    assert "2 of 2 texts lost punctuation, " in told.out and ": '\u201cyes\u201d' is now 'yes'\n" in told.out
    assert main([str(path), "--out", str(out), "--keep-punctuation"]) == 0
    assert [row["text"] for row in read_manifest(out)] == ["well, 2 it's - well-known!", "\u201cyes\u201d"]
    told = capsys.readouterr()
    assert "'-':2" in told.err and "leave --keep-punctuation out" in told.err and "lost" not in told.out


def test_written_language_becomes_what_the_validator_and_training_take(folder, capsys):
    """The first two lines of the README's section, on texts as people write them."""
    from recipes.data import CharEncoder

    said = ["Hello, there!", "Yes/no?", "Wait...what", "\u201cNo\u201d \u2014 he said", "It\u2019s me"]
    for n, words in enumerate(said):
        noise = np.random.default_rng(n).normal(scale=0.1, size=32000)
        soundfile.write(folder / f"{n}.wav", noise, 16000)
        with open(folder / "recordings.csv", "a", encoding="utf-8") as file:
            file.write(("" if n else "path,text\n") + f'{n}.wav,"{words}"\n')
    out = folder / "mine"
    assert main([str(folder / "recordings.csv"), "--out", str(out), "--split", "0.1"]) == 0
    assert capsys.readouterr().err.count("warning") == 0
    assert check(["--train", f"{out}/train.json", "--test", f"{out}/dev.json", f"{out}/test.json", "--audio"]) == 0
    texts = {row["text"] for name in ("train", "dev", "test") for row in read_manifest(out / f"{name}.json")}
    assert texts == {"hello there", "yes no", "wait what", "no he said", "it's me"}
    assert all(CharEncoder(LABELS)(text) for text in texts)


def test_a_text_of_punctuation_alone_is_a_bad_row(folder):
    path = table(folder, "x.csv", "path,text\nwavs/a.wav,...\n")
    with pytest.raises(TableError, match="x.csv:2: text '...' is nothing but punctuation"):
        build_rows(path)


@RELAXED
@given(st.text())
def test_stripped_text_is_still_normal(text):
    stripped = strip_punctuation(normalize(text))
    assert strip_punctuation(stripped) == stripped
    assert not set(stripped) & set(",.!?;:\"()[]-\u2013\u2014\u201c\u201d$+")


def corpus(count: int, speakers: int = 10) -> list[dict]:
    return [
        {"audio_filepath": f"/{n}.wav", "text": f"sentence {n % (count - count // 10)}", "speaker": f"s{n % speakers}"}
        for n in range(count)
    ]


@RELAXED
@given(st.integers(3, 400), st.floats(0.01, 0.45))
def test_splits_are_whole_disjoint_in_text_and_in_order(count, share):
    rows = [{**row, "text": f"sentence {n}"} for n, row in enumerate(corpus(count))]
    parts = split_rows(rows, share)
    assert all(parts.values()) and sorted(parts) == ["dev", "test", "train"]
    assert sorted((row["text"] for part in parts.values() for row in part)) == sorted(row["text"] for row in rows)
    for part in parts.values():
        assert part == [row for row in rows if row in part]


def test_a_sentence_is_never_in_two_splits_and_stays_when_data_is_added():
    before, after = split_rows(corpus(1000), 0.1), split_rows(corpus(1000) + corpus(1800)[1000:], 0.1)
    place = {row["text"]: name for name, part in after.items() for row in part}
    for name, part in before.items():
        assert {place[row["text"]] for row in part} == {name}
    assert 60 < len(before["test"]) < 140 and 60 < len(before["dev"]) < 140


def test_splits_by_speaker_share_none():
    parts = split_rows(corpus(200, speakers=30), 0.2, "speaker")
    speakers = [{row["speaker"] for row in part} for part in parts.values()]
    assert all(speakers) and sum(map(len, speakers)) == len(set.union(*speakers)) == 30
    # So few that a hash would leave some split empty: one each.
    parts = split_rows(corpus(90, 3), 0.1, "speaker")
    assert [len({row["speaker"] for row in part}) for part in parts.values()] == [1, 1, 1]


@pytest.mark.parametrize(
    ("rows", "share", "by", "words"),
    [
        (corpus(20), 0.5, "text", "between 0 and 0.5"),
        (corpus(20), 0.0, "text", "between 0 and 0.5"),
        (corpus(20), float("nan"), "text", "between 0 and 0.5"),
        (corpus(2), 0.1, "text", "2 different texts cannot be split"),
        (corpus(9, 2), 0.1, "speaker", "2 different speakers cannot be split"),
        ([{"audio_filepath": "/a.wav", "text": "x"}], 0.1, "speaker", "/a.wav: has no speaker to split by"),
    ],
)
def test_impossible_splits_are_named(rows, share, by, words):
    with pytest.raises(TableError, match=words):
        split_rows(rows, share, by)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--out", "."], "is a folder: name the manifest"),
        (["--out", "m.json", "--split", "0.1"], "names a file: with --split name a folder"),
    ],
)
def test_file_and_folder_are_not_mixed_up(folder, args, words, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    path = table(folder, "x.csv", FORMS["csv.csv"])
    before = sorted(os.listdir(folder))
    assert main([str(path), *args]) == 1
    assert words in capsys.readouterr().err and sorted(os.listdir(folder)) == before


@pytest.mark.parametrize("args", [["--out", "train.json"], ["--out", "./mine/../train.json"],
                                  ["--out", "link.json"], ["--out", ".", "--split", "0.1"]])
def test_the_table_is_never_replaced(folder, args, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "mine").mkdir()
    path = table(folder, "train.json", FORMS["lines.json"])
    (folder / "link.json").symlink_to(path)
    assert main(["train.json", *args]) == 1
    assert "would replace the table train.json" in capsys.readouterr().err
    assert path.read_text() == FORMS["lines.json"] and sorted(os.listdir(folder)) == [
        "link.json", "mine", "train.json", "wavs"]


def test_real_speech_from_a_table_to_three_valid_manifests(librispeech_sample, tmp_path):
    lines = ["path,sentence,speaker_id"]
    for trans in sorted(librispeech_sample.glob("*/*/*/*.trans.txt")):
        for line in trans.read_text().splitlines():
            utterance, _, text = line.partition(" ")
            lines.append(f"{trans.parent}/{utterance}.flac,{text},{utterance.partition('-')[0]}")
    path = table(tmp_path, "mine.csv", "\n".join(lines))
    command = [sys.executable, "-m", "manifests.own_data", str(path), "--out", str(tmp_path / "mine"), "--split", "0.1"]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    assert "warning" not in done.stderr
    paths = [tmp_path / "mine" / f"{name}.json" for name in ("train", "dev", "test")]
    assert sorted(os.listdir(tmp_path / "mine")) == ["dev.json", "test.json", "train.json"]
    report = validate(train=paths[:1], test=paths[1:], audio=True)
    assert report.errors == [] and report.total().lines == 83
    assert set(report.total().characters) <= set(LABELS)
    # A manifest is itself such a table.
    rows, _ = build_rows(paths[0])
    assert [row["audio_filepath"] for row in rows] == [row["audio_filepath"] for row in read_manifest(paths[0])]


@settings(RELAXED, max_examples=200)
@given(
    st.binary(max_size=120) | st.text(',;\t"\n\r ab[]{}:path', max_size=80).map(str.encode),
    st.sampled_from(["csv", "tsv", "json", "jsonl"]),
)
def test_any_bytes_give_rows_or_a_table_error(tmp_path_factory, raw, kind):
    path = table(tmp_path_factory.mktemp("any"), f"x.{kind}", raw)
    try:
        assert read_table(path)
    except TableError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)


def test_lines_are_counted_through_quoted_newlines_and_json(tmp_path):
    entries = read_table(table(tmp_path, "x.csv", 'path,text\na,"1\n2\n3"\nb,x\n\n"c\n",y\n'))
    assert [entry.line for entry in entries] == [2, 5, 7]
    text = json.dumps([{"path": "a", "text": str(n)} for n in range(3)], indent=1)
    lines = [number for number, line in enumerate(text.splitlines(), 1) if line.strip() == "{"]
    assert [entry.line for entry in read_table(table(tmp_path, "x.json", text))] == lines
