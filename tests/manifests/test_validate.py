"""Every fault that a manifest can have is found, at its line, and nothing else is; exit codes and JSON included."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manifests import validate as module
from manifests.librispeech import build_rows
from manifests.report import CODES, percentiles, table
from manifests.schema import LABELS, check_row, write_manifest
from manifests.validate import ctc_frames_needed, main, role_by_name, validate

# The machine may be busy: how long an example takes says nothing.
RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
ROOT = Path(__file__).parents[2]


@pytest.fixture
def audio(tmp_path):
    """Makes an audio file of noise and returns its path."""

    def make(name, seconds=2.0, rate=16000, channels=1):
        noise = np.random.default_rng(0).normal(scale=0.1, size=(round(seconds * rate), channels))
        soundfile.write(tmp_path / name, noise, rate)
        return str(tmp_path / name)

    return make


@pytest.fixture
def manifest(tmp_path, audio):
    """Writes lines (rows are completed by good fields of their own) to a manifest as they are, and returns its path."""

    def make(*lines, name="m.json"):
        written = []
        for number, line in enumerate(lines):
            if isinstance(line, dict):
                row = {"text": f"line number {chr(97 + number)}", "duration": 2.0, **line}
                if "audio_filepath" not in row:
                    row["audio_filepath"] = audio(f"{Path(name).stem}{number}.wav")
                line = json.dumps({key: value for key, value in row.items() if value is not ...})
            written.append(line)
        path = tmp_path / name
        path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in written))
        return str(path)

    return make


def found(report) -> list[tuple[str, str, int]]:
    return [(finding.severity, finding.code, finding.line) for finding in report.findings]


def test_a_good_manifest_has_no_findings(manifest):
    report = validate([manifest({}, {}, {})], audio=True)
    assert found(report) == [] and report.ok and report.exit_code == 0
    assert report.files[0].lines == 3 and report.files[0].seconds == 6.0


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", [("error", "blank_line", 2)]),
        ("{broken", [("error", "not_json", 2)]),
        ("[]", [("error", "not_object", 2)]),
        (b"\xff", [("error", "not_utf8", 2)]),
        ({"text": ...}, [("error", "missing_field", 2)]),
        ({"duration": ...}, [("error", "missing_field", 2)]),
        ({"audio_filepath": ...}, [("error", "missing_field", 2)]),
        ({"duration": "2.0"}, [("error", "wrong_type", 2)]),
        ({"duration": 0}, [("error", "bad_duration", 2)]),
        ({"duration": float("nan")}, [("error", "bad_duration", 2)]),
        ({"duration": float("inf"), "text": 5}, [("error", "bad_duration", 2), ("error", "wrong_type", 2)]),
        ({"sampling_rate": -1}, [("error", "bad_sampling_rate", 2)]),
        ({"sampling_rate": 8000}, [("warning", "other_rate", 2)]),
        ({"offset": float("nan")}, [("error", "bad_offset", 2)]),
        ({"audio_filepath": "a\0b"}, [("error", "bad_path", 2)]),
        ({"audio_filepath": "/nowhere/at/all.flac"}, [("error", "missing_audio", 2)]),
        ({"audio_filepath": "/"}, [("error", "missing_audio", 2)]),
        ({"text": ""}, [("error", "empty_text", 2)]),
        ({"text": " \t"}, [("error", "empty_text", 2)]),
        ({"text": "\ud800"}, [("error", "bad_string", 2)]),
        ({"text": "Hello there"}, [("error", "upper_case", 2)]),
        ({"text": "caf\u00e9 at 5"}, [("error", "outside_labels", 2)]),
        ({"text": "CAFE\u0301 AT 5"}, [("error", "upper_case", 2), ("error", "outside_labels", 2)]),
        ({"text": "a  b"}, [("warning", "spaces", 2)]),
        ({"text": "a b "}, [("warning", "spaces", 2)]),
        ({"text": "a\tb"}, [("warning", "spaces", 2), ("error", "outside_labels", 2)]),
        ({"duration": 0.05, "text": "a"}, [("warning", "too_short", 2)]),
        ({"text": "abcde" * 10}, []),
        ({"text": "abcde" * 10 + "a"}, [("warning", "ctc_too_long", 2)]),
        ({"text": "aa" * 13}, [("warning", "ctc_too_long", 2)]),
        ({"text": "abcde" * 17}, [("warning", "ctc_too_long", 2), ("warning", "speech_rate", 2)]),
    ],
)
def test_each_fault_is_found_at_its_line_and_alone(manifest, line, expected):
    report = validate([manifest({}, line, {})])
    assert sorted(found(report)) == sorted(expected)
    assert all(finding.code in CODES and finding.message for finding in report.findings)
    assert report.ok == all(severity == "warning" for severity, _, _ in expected)


def test_a_byte_order_mark_and_an_empty_file(manifest, tmp_path):
    path = tmp_path / "bom.json"
    path.write_bytes(b"\xef\xbb\xbf" + Path(manifest({})).read_bytes())
    assert found(validate([path])) == [("error", "bom", 1)]
    path.write_bytes(b"")
    assert found(validate([path])) == [("error", "empty_manifest", 1)]


def test_characters_outside_the_labels_are_counted_with_examples(manifest):
    path = manifest({"text": "Aha! Aha!"}, {"text": "good"}, {"text": "\u00e9!"})
    report = validate([path])
    assert report.outside == {
        "A": {"count": 2, "utterances": 1, "first": f"{path}:1"},
        "!": {"count": 3, "utterances": 2, "first": f"{path}:1"},
        "\u00e9": {"count": 1, "utterances": 1, "first": f"{path}:3"},
    }
    upper = next(finding for finding in report.findings if finding.code == "upper_case")
    assert upper.value == "'A'" and "2 capitals" in upper.message and "make the text lower case" in upper.message
    assert validate([path], labels=None).findings == []
    assert validate([path], labels=[*LABELS, "!", "A", "\u00e9"]).findings == []


def test_duplicates_within_a_file(manifest, audio, tmp_path):
    a, b = audio("a.wav"), audio("b.wav")
    path = manifest(
        {"audio_filepath": a, "utterance": "u1"},
        {"audio_filepath": b, "utterance": "u1"},
        # The same file, spelled in another way.
        {"audio_filepath": "./b.wav", "utterance": "u2"},
        # Another part of it is another utterance.
        {"audio_filepath": b, "offset": 0.5, "duration": 1.0, "utterance": "u3"},
        # The same words may be said twice.
        {"utterance": "u4", "text": "line number a"},
    )
    report = validate([path])
    assert found(report) == [("error", "duplicate_id", 2), ("error", "duplicate_audio", 3)]
    assert "stands on line 2 already" in report.findings[1].message


def test_leaks_between_train_and_test(manifest, audio):
    shared = audio("shared.wav")
    train = manifest({"text": "same words"}, {"audio_filepath": shared, "utterance": "u1"}, name="train.json")
    more = manifest({"text": "same words"}, {"utterance": "u9", "text": "other"}, name="more.json")
    test = manifest(
        {"text": "same words"}, {"audio_filepath": shared, "utterance": "u1", "text": "b"}, name="test.json"
    )
    report = validate(train=[train, more], test=[test])
    assert found(report) == [
        ("warning", "shared_text", 1),
        ("warning", "shared_text", 1),
        ("error", "shared_audio", 2),
        ("error", "shared_id", 2),
    ]
    assert {finding.file for finding in report.findings} == {test}
    assert f"is in {train}:2 too" in report.findings[2].message
    # Names tell the same.
    report = validate([train, test])
    assert [code for severity, code, _ in found(report) if severity == "error"] == ["shared_audio", "shared_id"]
    # With no role it cannot be known to be a leak; nobody is refused.
    plain = [Path(path).with_name(name) for path, name in ((train, "a.json"), (test, "b.json"))]
    for path, source in zip(plain, (train, test), strict=True):
        path.write_bytes(Path(source).read_bytes())
    report = validate(plain)
    assert report.ok and sorted(code for _, code, _ in found(report)) == ["shared_audio", "shared_id", "shared_text"]
    # Training sets may share words.
    assert found(validate(train=[train, more])) == []
    # One file under two names for it is still one.
    assert found(validate([train, f"{Path(train).parent}/./train.json"])) == []
    with pytest.raises(ValueError, match="given both as train and as test"):
        validate(train=[train], test=[train])


@pytest.mark.parametrize(
    ("name", "role"),
    [("train", "train"), ("train-clean-100", "train"), ("dev", "test"), ("test-new-words", "test"), ("eval", "test"),
     ("my_valid", "test"), ("train_dev", ""), ("trainer", ""), ("device", ""), ("m", "")],
)
def test_a_name_tells_what_a_manifest_is_for(name, role):
    assert role_by_name(f"/train/{name}.json") == role


def test_the_docstrings_first_example_finds_a_leak(manifest, audio, capsys):
    shared = audio("shared.wav")
    train = manifest({"audio_filepath": shared}, name="train.json")
    test = manifest({"audio_filepath": shared, "text": "other"}, name="test.json")
    assert main([train, test]) == 1
    assert f"{test}:1: error: shared_audio" in capsys.readouterr().out


def test_texts_are_compared_normalised(manifest):
    train = manifest({"text": "the same  words"}, name="train.json")
    test = manifest({"text": "The same words"}, name="test.json")
    assert ("warning", "shared_text", 1) in found(validate([train, test]))


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"duration": 2.2}, "duration_mismatch"),
        ({"duration": 1.8}, "duration_mismatch"),
        ({"duration": 2.008}, None),
        ({"sampling_rate": 16000}, None),
        ({"offset": 0.5, "duration": 1.0}, None),
        ({"offset": 0.5, "duration": 1.6}, "duration_mismatch"),
        ({"offset": 0.0, "duration": 1.5}, None),
    ],
)
@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_figures_are_compared_with_the_audio(manifest, audio, changes, code, suffix):
    path = manifest({"audio_filepath": audio(f"x.{suffix}"), **changes})
    assert validate([path]).findings == []
    assert [finding[1:] for finding in found(validate([path], audio=True))] == ([(code, 1)] if code else [])


def test_rates_and_channels_are_compared_with_the_audio(manifest, audio):
    low, stereo = audio("low.wav", rate=8000), audio("stereo.flac", channels=2)
    path = manifest(
        {"audio_filepath": low, "sampling_rate": 16000},
        {"audio_filepath": low, "offset": 0.1, "duration": 1.0},
        {"audio_filepath": stereo},
    )
    expected = [("error", "rate_mismatch", 1), ("warning", "other_rate", 2), ("error", "not_mono", 3)]
    assert found(validate([path], audio=True)) == expected
    assert found(validate([path], audio=True, sampling_rate=8000))[0] == ("warning", "other_rate", 1)


def test_broken_audio_is_found_only_by_looking_at_it(manifest, audio, tmp_path):
    cut, empty, text = Path(audio("cut.flac")), tmp_path / "empty.flac", tmp_path / "text.wav"
    cut.write_bytes(cut.read_bytes()[:-100])
    empty.touch()
    text.write_text("not audio")
    path = manifest(*({"audio_filepath": str(each)} for each in (cut, empty, text)), {})
    assert found(validate([path])) == []
    report = validate([path], audio=True)
    assert found(report) == [("error", "broken_audio", number) for number in (1, 2, 3)]
    assert "is cut off" in report.findings[0].message


def test_odd_rates_of_speech_stand_out(manifest, audio):
    one = audio("one.wav", 60)
    chosen = np.random.default_rng(0)
    texts = ["abcde " * 5 + "a" * int(chosen.integers(1, 9)) for _ in range(40)]
    lines = [{"audio_filepath": one, "offset": float(at), "text": text} for at, text in enumerate(texts)]
    lines[7] = {"audio_filepath": one, "offset": 41.0, "text": "ab", "duration": 4.0}
    lines[9] = {"audio_filepath": one, "offset": 51.0, "text": "abcde " * 15 + "a", "duration": 2.5}
    report = validate([manifest(*lines)], frames_per_second=0)
    assert found(report) == [("warning", "speech_rate", 8), ("warning", "speech_rate", 10)]
    assert "0.5 characters a second, the median here is 17" in report.findings[0].message


@RELAXED
@given(st.text("ab c'", max_size=12))
def test_ctc_frames_are_those_of_the_shortest_alignment(text):
    # By hand: a path is the characters with a blank wherever two neighbours are equal.
    path = []
    for char in text:
        if path and path[-1] == char:
            path.append(None)
        path.append(char)
    assert ctc_frames_needed(text) == len(path)


@RELAXED
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_percentiles_agree_with_numpy(values):
    shares = (0, 5, 50, 99, 100)
    assert np.allclose(list(percentiles(values, shares).values()), np.percentile(values, shares))
    assert percentiles([]) == {}


def test_json_holds_every_finding_and_the_print_the_first(manifest, tmp_path, capsys):
    path = manifest(*({"text": f"A{chr(97 + number)}"} for number in range(9)))
    out = tmp_path / "out" / "report.json"
    assert main([path, "--json", str(out), "--show", "2"]) == 1
    shown = capsys.readouterr().out
    assert "upper_case" in shown and f"{path}:2: error: upper_case" in shown and f"{path}:3: error" not in shown
    assert "... and 7 more of upper_case" in shown
    assert "9 errors, 0 warnings" in shown
    saved = json.loads(out.read_text())
    assert saved["counts"] == {"upper_case": 9} and len(saved["findings"]) == 9
    assert saved["findings"][4]["line"] == 5 and saved["findings"][4]["file"] == path
    assert saved["files"][0]["characters"]["A"] == 9 and saved["outside_labels"]["A"]["count"] == 9
    assert saved["total"]["words"] == 9 and saved["total"]["distinct_words"] == 9
    assert saved["total"]["vocabulary"] == {f"A{letter}": 1 for letter in "abcdefghi"}
    assert not saved["ok"]


@pytest.mark.parametrize(
    ("lines", "args", "code"),
    [
        ([{}], [], 0),
        ([{"text": "a  b"}], [], 0),
        ([{"text": "A"}], [], 1),
        ([{"text": "A"}], ["--labels", ""], 0),
        ([{"text": "abc"}], ["--labels", "ab"], 1),
        ([{"text": "ab " * 20}], ["--frames-per-second", "0"], 0),
        ([], [], 1),
        ([{"duration": 1.0}], [], 0),
        ([{"duration": 1.0}], ["--audio"], 1),
        ([{"text": "A"}], ["/nowhere.json"], 2),
        ([{}], ["--json", "/proc/nowhere/x.json"], 2),
    ],
)
def test_exit_codes(manifest, lines, args, code, capsys):
    assert main([manifest(*lines), *args]) == code


def test_no_file_or_one_in_both_roles_is_refused(manifest, capsys):
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2 and "no manifest given" in capsys.readouterr().err
    path = manifest({})
    assert main(["--train", path, "--test", path]) == 2
    assert "given both as train and as test" in capsys.readouterr().err


def test_one_bad_manifest_does_not_hide_the_others(manifest, tmp_path):
    good, missing = manifest({"text": "A"}), str(tmp_path / "missing.json")
    report = validate([missing, good, tmp_path])
    assert report.exit_code == 2
    assert [(finding.code, finding.file) for finding in report.findings] == [
        ("unreadable", missing),
        ("upper_case", good),
        ("unreadable", str(tmp_path)),
    ]
    assert missing in report.text() and "No such file" in report.text()


def test_every_code_in_the_source_has_a_meaning(tmp_path):
    used = set(re.findall(r'add\(\s*"(?:error|warning)", "(\w+)"', inspect.getsource(module)))
    assert len(used) > 10 and used <= CODES.keys()
    assert {f"{kind}_{what}" for kind in ("shared",) for what in ("audio", "id", "text")} <= CODES.keys()
    broken = {"audio_filepath": 1, "text": "\ud800", "duration": 0, "offset": -1, "sampling_rate": 0}
    rows = [{}, {"audio_filepath": ""}, broken]
    assert {problem.code for row in rows for problem in check_row(row)} <= CODES.keys()


def test_table_aligns():
    assert table(["a", "bb"], [["xxx", "1"], ["y", "22"]]) == "a    bb\n---  --\nxxx   1\ny    22"


def test_real_speech_is_clean(librispeech_sample, tmp_path, capsys):
    paths = []
    for subset in ("train-clean-5", "train-clean-100"):
        paths.append(str(tmp_path / f"{subset}.json"))
        write_manifest(paths[-1], build_rows(librispeech_sample, subset))
    report = validate(paths, audio=True)
    assert report.errors == []
    # One reader leaves a long pause; nothing else is odd about them.
    assert {finding.code for finding in report.findings} <= {"speech_rate"} and len(report.findings) <= 2
    total = report.total().to_dict()
    assert total["utterances"] == 83 and total["speakers"] == 6
    assert set(total["characters"]) <= set(LABELS)
    assert 10 < total["characters_per_second"]["p50"] < 18 and total["ctc_frames_per_second"]["p100"] < 25
    # In capitals, as the transcripts are, each line is told.
    rows = [{**row, "text": row["text"].upper()} for row in build_rows(librispeech_sample, "train-clean-5")]
    write_manifest(tmp_path / "upper.json", rows)
    report = validate([tmp_path / "upper.json"])
    assert sum(finding.code == "upper_case" for finding in report.errors) == len(report.errors) == 55


def test_the_plain_check_imports_nothing_heavy(manifest):
    code = (
        "import sys; from manifests.validate import main; main(sys.argv[1:]);"
        "heavy = {'torch', 'nemo', 'lhotse', 'numpy', 'soundfile', 'recipes', 'tools'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, manifest({})], check=True, cwd=ROOT, capture_output=True)
