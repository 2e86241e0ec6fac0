"""What a loader delivers against its manifest: the right pairs, sorted apart, cut, from other lines, numbered apart."""

import json

import pytest

torch = pytest.importorskip("torch")

from tools.doctor.configs import load_config
from tools.doctor.delivered import Delivered, moving
from tools.doctor.registry import NotExamined

RATE = 16000
WORDS = "one two three four five six seven eight nine ten".split()


@pytest.fixture
def rows(tmp_path):
    """48 rows, no two of a length, and the manifest of them."""
    rows = [{"audio_filepath": f"a{k}.wav", "text": f"{WORDS[k % 10]} {WORDS[k // 10]} {WORDS[(3 * k) % 10]} {k * 'a'}",
             "duration": 1.0 + 0.11 * k} for k in range(48)]
    (tmp_path / "train.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def delivered(tmp_path, rows, change=lambda seconds, texts: (seconds, texts)) -> Delivered:
    """All rows in batches of eight in a mixed order, each batch's (seconds, texts) through `change`."""
    seen = Delivered([str(tmp_path / "train.json")], RATE)
    mixed = [rows[(7 * k) % 48] for k in range(48)]
    for start in range(0, 48, 8):
        part = mixed[start : start + 8]
        seconds, texts = change([row["duration"] for row in part], [row["text"] for row in part])
        lengths = torch.tensor([round(s * RATE) for s in seconds])
        seen.add((torch.zeros(8, 2), lengths, None, None), texts)
    assert seen.rows == 48 and not seen.wanted
    return seen


def test_pairs_that_belong_together_are_no_finding(tmp_path, rows):
    assert delivered(tmp_path, rows).judge() == []
    assert delivered(tmp_path, rows, lambda s, t: ([0.9 * x if k % 3 else 1.1 * x for k, x in enumerate(s)], t)
                     ).judge() == []  # speed perturbation
    assert delivered(tmp_path, rows, lambda s, t: ([x - 0.2 for x in s], t)).judge() == []  # silence trimmed


def test_audio_sorted_without_its_texts(tmp_path, rows):
    [found] = delivered(tmp_path, rows, lambda s, t: (sorted(s, reverse=True), t)).judge()
    assert (found.id, found.weight) == ("data-mismatched-text", "prevents")
    assert found.evidence["the audio of each batch is sorted by length"] is True and found.confidence > 0.95


def test_texts_of_other_lines(tmp_path, rows):
    texts = [row["text"] for row in rows]
    seen = delivered(tmp_path, rows, lambda s, t: (s, [texts[(texts.index(text) + 19) % 48] for text in t]))
    [found] = seen.judge()
    assert (found.id, found.weight) == ("data-mismatched-text", "prevents")


def test_audio_that_is_cut(tmp_path, rows):
    [found] = delivered(tmp_path, rows, lambda s, t: ([min(x, 2.5) for x in s], t)).judge()
    assert (found.id, found.weight) == ("data-duration-wrong", "prevents")
    assert found.evidence["longest delivered"] == pytest.approx(2.5, abs=0.01)


def shorter(seconds, texts):
    """Silence cut off: more of it in one row than in the next."""
    return [x * (0.45 + 0.1 * (k % 5)) for k, x in enumerate(seconds)], texts


def longer(seconds, texts):
    return [max(x, 4.5) for x in seconds], texts


@pytest.mark.parametrize("change", [shorter, longer])
def test_audio_that_is_moved_one_way_is_no_other_text(tmp_path, rows, change):
    [found] = delivered(tmp_path, rows, change).judge()
    assert (found.id, found.weight) == ("data-duration-wrong", "warning")
    seen = delivered(tmp_path, rows, change)
    seen.options = moving(load_config({"model": {"train_ds": {"trim_silence": True}}}))
    with pytest.raises(NotExamined, match="model.train_ds.trim_silence of the loader"):
        seen.judge()


def test_texts_of_other_lines_are_told_with_silence_cut_off_too(tmp_path, rows):
    texts = [row["text"] for row in rows]
    seen = delivered(tmp_path, rows, lambda s, t: (s, [texts[(texts.index(text) + 19) % 48] for text in t]))
    seen.options = ["model.train_ds.trim_silence"]
    [found] = seen.judge()
    assert (found.id, found.weight) == ("data-mismatched-text", "prevents")
    assert moving(None) == moving(load_config({"model": {"train_ds": {"trim_silence": False}}})) == []


def test_labels_numbered_otherwise(tmp_path, rows):
    letters = "abcdefghijklmnopqrstuvwxyz "
    shifted = str.maketrans(letters, letters[1:] + letters[0])
    [found] = delivered(tmp_path, rows, lambda s, t: (s, [text.translate(shifted) for text in t])).judge()
    assert (found.id, found.weight) == ("label-order", "prevents") and found.evidence["agreeing"] == 1.0


def test_texts_that_stand_nowhere_are_not_judged(tmp_path, rows):
    with pytest.raises(NotExamined, match="stand in no manifest"):
        delivered(tmp_path, rows, lambda s, t: (s, ["something else altogether"] * 8)).judge()
    with pytest.raises(NotExamined, match="16 are needed"):
        Delivered([str(tmp_path / "train.json")], RATE).judge()


def test_marks_around_every_text(tmp_path, rows):
    [found] = delivered(tmp_path, rows, lambda s, t: (s, ["b" + text + "?" for text in t])).judge()
    assert (found.id, found.weight) == ("data-mismatched-text", "warning")
    assert (found.evidence["before each text"], found.evidence["behind each text"]) == ("b", "?")
    assert found.evidence["rows"] == 48


def test_targets_that_differ_from_row_to_row_are_no_marks(tmp_path, rows):
    seen = delivered(tmp_path, rows, lambda s, t: (s, [chr(97 + k) + text for k, text in enumerate(t)]))
    with pytest.raises(NotExamined):
        seen.judge()
