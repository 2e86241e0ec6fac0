"""The reader and writer of manifests: what goes in comes out, and what is broken is named in one line."""

import json
import os
import re
import stat

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from manifests import schema
from manifests.schema import (
    FIELDS,
    LABELS,
    ManifestError,
    check_row,
    iter_manifest,
    read_manifest,
    resolve_audio,
    scan_manifest,
    write_manifest,
)
from manifests.text import normalize

# The machine may be busy: how long an example takes says nothing.
RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
GOOD = {"audio_filepath": "/data/a.flac", "duration": 1.25, "text": "hello there"}


def line(**changes) -> str:
    return json.dumps({**GOOD, **changes})


def test_labels_are_the_28_that_models_share():
    assert len(LABELS) == 28 and LABELS[0] == " " and LABELS[-1] == "'"
    assert "".join(LABELS[1:-1]) == "abcdefghijklmnopqrstuvwxyz"


# Text that UTF-8 can hold; anything else in it is fair, line separators and zero bytes included.
texts = st.text(st.characters(exclude_categories=["Cs"]))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
rows = st.builds(
    lambda base, extra: {**extra, **base},
    st.fixed_dictionaries(
        {
            "audio_filepath": texts.filter(lambda text: text and "\0" not in text),
            "duration": st.floats(min_value=1e-9, max_value=1e9) | st.integers(1, 10**9),
            "text": texts,
        },
        optional={
            "sampling_rate": st.integers(1, 2**31 - 1),
            "offset": st.floats(min_value=0, max_value=1e9),
            "speaker": texts | st.integers(),
            "utterance": texts,
            "gender": texts,
        },
    ),
    st.dictionaries(texts.filter(lambda name: name not in FIELDS), json_values, max_size=3),
)


@RELAXED
@given(st.lists(rows, min_size=1, max_size=8))
def test_what_is_written_is_read_back(tmp_path_factory, some_rows):
    path = tmp_path_factory.mktemp("round") / "m.json"
    assert write_manifest(path, some_rows) == len(some_rows)
    assert read_manifest(path) == some_rows
    # One object a line for every other reader too: universal newlines, as NeMo opens it, must not cut a line.
    with open(path, encoding="utf-8") as file:
        assert [json.loads(each) for each in file] == some_rows


@settings(RELAXED, max_examples=300)
@example(b"\xef\xbb\xbf{}")
@example(b"[" * 100_000)
@example(b"1" * 5000)
@example(b'{"audio_filepath": "a", "duration": 1' + b"0" * 400 + b', "text": ""}')
@example(b'{"audio_filepath": "a", "duration": 1, "text": "\\ud800"}')
@example(b'{"audio_filepath": "a\\u0000", "duration": 1, "text": ""}')
@example(b"\x00")
@example(b"\r\r\n")
@given(st.binary(max_size=200) | st.binary(max_size=40).map(lambda raw: line().encode() + raw))
def test_any_bytes_give_rows_or_a_manifest_error(tmp_path_factory, raw):
    path = tmp_path_factory.mktemp("bytes") / "m.json"
    path.write_bytes(raw)
    try:
        found = read_manifest(path)
    except ManifestError as error:
        message = str(error)
        assert re.match(rf"{re.escape(str(path))}:\d+: ", message)
        assert "\n" not in message and message.isprintable()
    else:
        assert found and all(check_row(row) == [] for row in found)


@RELAXED
@given(st.dictionaries(st.sampled_from(sorted(FIELDS)) | texts, json_values | st.floats(), max_size=6))
def test_check_row_takes_any_values_and_the_writer_agrees_with_it(tmp_path_factory, row):
    problems = check_row(row)
    assert all(problem.code and problem.message for problem in problems)
    path = tmp_path_factory.mktemp("any") / "m.json"
    if problems:
        with pytest.raises(ManifestError, match="nothing was written"):
            write_manifest(path, [GOOD, row])
        assert not path.exists() and not list(path.parent.iterdir())


@pytest.mark.parametrize(
    ("raw", "number", "words"),
    [
        (b"", 1, "no utterance"),
        (b"\n \n", 1, "no utterance"),
        (b"\xef\xbb\xbf" + line().encode(), 1, "byte order mark"),
        (line().encode() + b"\n\xff\xfe", 2, "not UTF-8 at byte 1"),
        (line().encode() + b"\n\n{oops}\n", 3, "not JSON, expecting property name"),
        (line().encode() + b" {}", 1, "not JSON, extra data"),
        (b"[1, 2]", 1, "a list, not an object"),
        (b"null", 1, "a NoneType, not an object"),
        (b'{"text": "a", "text": "b"}', 1, "'text' stands twice"),
        (b"[" * 100_000, 1, "nested too deeply"),
        (b'{"duration": 1.0, "text": "a"}', 1, "no 'audio_filepath' field"),
        (b'{"audio_filepath": "a", "duration": 1.0}', 1, "no 'text' field (NeMo would train on an empty target)"),
        (line(audio_filepath=["a"]).encode(), 1, "audio_filepath is ['a'], of type list: make it a string"),
        (line(audio_filepath="").encode(), 1, "is no path"),
        (line(duration="1.5").encode(), 1, "duration is '1.5', of type str: make it a number"),
        (line(duration=True).encode(), 1, "duration is True, of type bool"),
        (line(duration=None).encode(), 1, "duration is None"),
        (line(duration=float("nan")).encode(), 1, "duration is nan: it must be a finite number of seconds"),
        (line(duration=float("-inf")).encode(), 1, "duration is -inf"),
        (line(duration=0).encode(), 1, "duration is 0: it must be over 0 seconds"),
        (line(duration=-1.5).encode(), 1, "duration is -1.5"),
        (line(duration=10**400).encode(), 1, "must be a finite number"),
        (line(text=None).encode(), 1, "text is None"),
        (line(text=3).encode(), 1, "text is 3, of type int: make it a string"),
        (line(sampling_rate=16000.0).encode(), 1, "sampling_rate is 16000.0, of type float: make it an integer"),
        (line(sampling_rate=0).encode(), 1, "sampling_rate is 0"),
        (line(offset=-0.1).encode(), 1, "offset is -0.1: it must be 0 or more"),
        (b'{"audio_filepath": "a", "duration": 1, "text": "\\ud83d"}', 1, "lone surrogate"),
    ],
)
def test_broken_lines_are_named(tmp_path, raw, number, words):
    path = tmp_path / "m.json"
    path.write_bytes(raw)
    with pytest.raises(ManifestError) as caught:
        read_manifest(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{number}: ")
    assert words in message
    assert "\n" not in message and len(message) < 300 + len(str(path))


def test_crlf_blank_lines_and_a_missing_last_newline_are_fine(tmp_path):
    path = tmp_path / "m.json"
    path.write_bytes(line(text="one").encode() + b"\r\n\r\n   \n" + line(text="two").encode())
    assert [(number, row["text"]) for number, row in iter_manifest(path)] == [(1, "one"), (4, "two")]
    blanks = []
    assert [found.number for found in scan_manifest(path, on_blank=blanks.append)] == [1, 4]
    assert blanks == [2, 3]
    with pytest.raises(ManifestError, match=r"m.json:2: is blank, which lhotse cannot read"):
        list(iter_manifest(path, blank=False))


def test_required_fields_can_be_fewer(tmp_path):
    path = tmp_path / "m.json"
    path.write_text('{"audio_filepath": "a.wav"}\n')
    assert read_manifest(path, required=["audio_filepath"]) == [{"audio_filepath": "a.wav"}]
    with pytest.raises(ManifestError, match="no 'duration' field"):
        read_manifest(path, required=["audio_filepath", "duration"])


@pytest.mark.parametrize("name", ["nowhere.json", "."])
def test_an_unreadable_file_is_named(tmp_path, name):
    with pytest.raises(ManifestError, match="cannot read the manifest"):
        read_manifest(tmp_path / name)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "m.json"
    write_manifest(path, [GOOD])
    before = path.read_bytes()
    circular = {**GOOD}
    circular["self"] = circular
    unfit = [{**GOOD, **extra} for extra in ({"duration": float("nan")}, {"x": float("inf")}, {"x": {1, 2}})]
    for bad in (*unfit, circular, "text"):
        with pytest.raises(ManifestError, match=re.escape(f"{path}:2: ")):
            write_manifest(path, [GOOD, bad])
    with pytest.raises(RuntimeError, match="midway"):
        write_manifest(path, (row if row else (_ for _ in ()).throw(RuntimeError("midway")) for row in [GOOD, None]))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.json"]


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "m.json"
    write_manifest(path, [GOOD])

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(schema.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_manifest(path, [GOOD, GOOD])
    assert read_manifest(path) == [GOOD]
    assert os.listdir(tmp_path) == ["m.json"]


def test_a_file_of_the_same_bytes_keeps_its_time(tmp_path):
    path = tmp_path / "m.json"
    write_manifest(path, [GOOD])
    os.utime(path, (1000, 1000))
    write_manifest(path, [GOOD])
    assert path.stat().st_mtime == 1000
    write_manifest(path, [{**GOOD, "text": GOOD["text"][::-1]}])
    assert path.stat().st_mtime > 1000


def test_files_are_made_with_the_usual_rights_and_folders(tmp_path):
    path = tmp_path / "deep" / "er" / "m.json"
    old = os.umask(0o027)
    try:
        write_manifest(path, [GOOD])
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_text_is_written_as_itself(tmp_path):
    path = tmp_path / "m.json"
    write_manifest(path, [{**GOOD, "text": "žluťoučký\u2028kůň \"x\""}])
    assert "žluťoučký\u2028kůň" in path.read_text(encoding="utf-8")


def test_audio_paths_are_resolved_as_nemo_does(tmp_path, monkeypatch):
    manifest = tmp_path / "manifests" / "m.json"
    beside = tmp_path / "manifests" / "wavs" / "a.wav"
    beside.parent.mkdir(parents=True)
    work = tmp_path / "work"
    (work / "wavs").mkdir(parents=True)
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(work))

    def resolve(audio: str) -> str:
        return resolve_audio({"audio_filepath": audio}, manifest)

    assert resolve("/abs/b.wav") == "/abs/b.wav"
    assert resolve("wavs/a.wav") == str(beside), "a missing file is expected beside the manifest"
    (work / "wavs" / "a.wav").touch()
    assert resolve("wavs/a.wav") == str(work / "wavs" / "a.wav")
    beside.touch()
    assert resolve("wavs/a.wav") == str(beside)
    assert resolve("~/wavs/a.wav") == str(work / "wavs" / "a.wav")
    assert resolve_audio({"audio_filepath": "wavs/a.wav"}, os.path.relpath(manifest)) == str(beside)


@RELAXED
@given(st.text())
def test_normalize_is_idempotent_and_leaves_no_odd_space(text):
    once = normalize(text)
    assert normalize(once) == once
    assert once == " ".join(once.split())
    assert not set(once) & set("\u2018\u2019\u02bc`")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  HELLO   There\n", "hello there"),
        ("It\u2019s \u2018fine\u2019", "it's 'fine'"),
        ("DON\u00b4T", "don't"),
        ("don`t", "don't"),
        ("\uff28\uff25\uff2c\uff2c\uff2f\u3000\ufb01ne", "hello fine"),
        ("CAFE\u0301", "caf\u00e9"),
        ("\u2122", "tm"),
        ("Stra\u00dfe, No. 5!", "stra\u00dfe, no. 5!"),
        ("", ""),
    ],
)
def test_normalize(text, expected):
    assert normalize(text) == expected
