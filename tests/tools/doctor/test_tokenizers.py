"""Tokenizers of every kind that NeMo knows, labels of several characters, and what texts hold beside words. No torch."""

import json
from collections import Counter

import pytest

from manifests.tokenizer import train as train_tokenizer
from tests.recipes import tiny
from tools.doctor.engine import examine
from tools.doctor.spelling import vowel_marks, without_labels

LABELS = [" ", *"abcdefghijklmnopqrstuvwxyz'"]
WORDS = "the cat sat on a mat and then it ran away to see what was there for food".split()


def rows(count=60, change=str, **fields):
    texts = [" ".join(WORDS[(i * 7 + j * 3) % len(WORDS)] for j in range(2 + i % 9)) for i in range(count)]
    return [{"audio_filepath": f"/there/u{i}.wav", "duration": round(0.3 + len(text) / 20, 2), "text": change(text), **fields}
            for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([tiny.write_rows(folder / "t.json", rows())], folder / "bpe", vocab=30)
    (folder / "wpe").mkdir()
    (folder / "wpe" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", *"abcdefghijklmnopqrstuvwxyz"]))
    return folder


def ids(folder, config, train=None, families=("tokenizer",), **more):
    path = str(tiny.write_rows(folder / "train.json", rows() if train is None else train))
    return examine(config=config, manifests={"train": path}, families=list(families), **more)


def tokenizer(**section):
    return {"model": {"tokenizer": section}}


@pytest.mark.parametrize("section, said", [
    ({"type": "bpe", "dir": "{}/bpe"}, None),
    ({"type": "bpe", "dir": None, "model_path": "{}/bpe/tokenizer.model"}, None),
    ({"type": "bpe", "dir": "/of/nvidia", "model_path": "nemo:1234_tokenizer.model"}, None),
    ({"type": "wpe", "dir": "{}/wpe"}, None),
    ({"type": "wpe", "dir": "/none", "vocab_path": "{}/wpe/vocab.txt"}, None),
    ({"type": "agg", "langs": {"en": {"type": "bpe", "dir": "{}/bpe"}, "es": {"type": "wpe", "dir": "{}/wpe"}}}, None),
    ({"type": "bpe", "dir": "/none"}, "There is no tokenizer at /none/tokenizer.model."),
    ({"type": "wpe", "dir": "{}/bpe/x"}, "bpe/x/vocab.txt."),
    ({"type": "agg", "langs": {"en": {"type": "bpe", "dir": "{}/bpe"}, "es": {"type": "bpe", "dir": "/none"}}},
     "/none/tokenizer.model"),
])
def test_where_a_tokenizer_is_hangs_on_its_type(sentencepiece, tmp_path, section, said):
    section = json.loads(json.dumps(section).replace("{}", str(sentencepiece)))
    report = ids(tmp_path, tokenizer(**section), rows(lang="en"))
    assert report.ids == ["tokenizer-vocabulary"] * bool(said) and report.exit_code == bool(said)
    assert not said or said in report.findings[0].symptom


def test_a_language_of_an_aggregate_is_held_against_its_own_tokenizer(sentencepiece, tmp_path):
    part = {"type": "bpe", "dir": str(sentencepiece / "bpe")}
    config = tokenizer(type="agg", langs={"en": part, "ru": part})
    report = ids(tmp_path, config, rows(lang="en") + rows(30, lambda text: "привет " * len(text.split()), lang="ru"))
    assert report.ids == ["tokenizer-vocabulary"] and report.exit_code == 1
    assert "unknown to the tokenizer" in report.findings[0].symptom


@pytest.mark.parametrize("lang, wrong", [({"lang": "en"}, 0), ({"lang": "en-US"}, 60), ({}, 60)])
def test_rows_of_an_aggregate_say_their_language(sentencepiece, tmp_path, lang, wrong):
    part = {"type": "bpe", "dir": str(sentencepiece / "bpe")}
    report = ids(tmp_path, tokenizer(type="agg", langs={"en": part, "es": part}), rows(**lang))
    found = [finding for finding in report.findings if "model.tokenizer.langs" in finding.symptom]
    assert [finding.weight for finding in found] == ["prevents"] * bool(wrong)
    assert not wrong or found[0].evidence["rows"] == wrong


def test_a_run_needs_no_tokenizer_any_more_and_a_configuration_does(tmp_path):
    section = {"tokenizer": {"type": "bpe", "dir": "/of/nvidia"}, "train_ds": {}, "preprocessor": {"sample_rate": 16000}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "hparams.yaml").write_text(json.dumps({"cfg": section}))
    (tmp_path / "run" / "metrics.csv").write_text("step,train_loss\n1,3.0\n2,2.9\n")
    path = str(tiny.write_rows(tmp_path / "train.json", rows()))
    report = examine(run=tmp_path / "run", manifests={"train": path}, families=["tokenizer"])
    assert report.findings == [] and any("is not here" in line for line in report.not_examined)
    assert ids(tmp_path, {"model": section}).exit_code == 1
    hybrid = {"model": {**section, "joint": {}, "aux_ctc": {"ctc_loss_weight": 0.3}}}
    assert ids(tmp_path, hybrid).findings == []


# ---- labels ----------------------------------------------------------------------------------------------------

PHONEMES = {"the": "DH AH0", "cat": "K AE1 T", "sat": "S AE1 T", "a": "AH0", "mat": "M AE1 T"}
INVENTORY = sorted({part for word in PHONEMES.values() for part in word.split()})


def said_in_phonemes(text):
    return " ".join(PHONEMES.get(word, "S AE1 T M AH0") for word in text.split())


@pytest.mark.parametrize("labels", [INVENTORY, [" ", *INVENTORY]])
def test_labels_of_several_letters_are_words_of_the_texts(tmp_path, labels):
    config = {"model": {"labels": labels}}
    assert ids(tmp_path, config, rows(change=said_in_phonemes), ["tokenizer"]).findings == []
    report = ids(tmp_path, config, rows(change=said_in_phonemes), ["data"])
    assert set(report.ids) == {"data-missing-audio"}


def test_labels_of_several_letters_that_no_text_has(tmp_path):
    config = {"model": {"labels": [*LABELS, "ch", "sh"]}}
    report = ids(tmp_path, config)
    assert [(finding.id, finding.weight) for finding in report.findings] == [("tokenizer-vocabulary", "warning")]
    assert "2 labels are not single characters, and no word of the texts: ['ch', 'sh']" in report.findings[0].symptom
    bare = ids(tmp_path, {"model": {"labels": [*LABELS[:-2], "True"]}})
    assert "['True']" in bare.findings[0].symptom


def test_what_phonemes_cannot_spell_is_still_lost(tmp_path):
    texts = rows(change=lambda text: said_in_phonemes(text) + " ZH ZH ZH")
    report = ids(tmp_path, {"model": {"labels": [" ", *INVENTORY]}}, texts, ["data"])
    found = next(finding for finding in report.findings if finding.id == "data-characters")
    assert "H" in found.evidence["first"][0] and found.evidence["utterances"] == 60
    assert without_labels("AE1 ch AE1", {"AE1"}) == " ch "


ARABIC = [" ", *"كتبقلمدرسةوا"]


@pytest.mark.parametrize("text, weight", [
    ("كَتَبَ قَلَمٌ دَرَسَ", "warning"), ("كتب قلم درس", None), ("жжж жжж ж", "prevents"),
])
def test_vowel_signs_may_be_left_out(tmp_path, text, weight):
    report = ids(tmp_path, {"model": {"labels": ARABIC}}, rows(change=lambda _: text), ["data"])
    assert [f.weight for f in report.findings if f.id == "data-characters"] == [weight] * bool(weight)
    assert vowel_marks(Counter("كَتَبَ")) == 3 and vowel_marks(Counter("e\u0301")) == 0


@pytest.mark.parametrize("change, said", [
    (lambda text: f"[noise] {text}", "marks of noises"), (lambda text: f"{text} <unk>", "marks of noises"),
    (lambda text: f"<i>{text}</i>", "tags or entities of HTML"),
    (lambda text: f"{text} caf\u00c3\u00a9", "read as another encoding"),
    (lambda text: text.replace(" ", "|"), "| for spaces"),
    (lambda text: f"{text} caf\u00e9 \u00e0 la carte irm\u00e3 \u00ab\u00e2ge\u00bb", None), (str, None),
])
def test_texts_of_pieces_hold_what_is_spoken(sentencepiece, tmp_path, change, said):
    config = tokenizer(type="bpe", dir=str(sentencepiece / "bpe"))
    texts = rows(change=change)
    found = [f for f in ids(tmp_path, config, texts, ["pairs"]).findings if " hold " in f.symptom]
    assert [(f.id, f.weight) for f in found] == [("data-mismatched-text", "warning")] * bool(said)
    assert not said or said in found[0].symptom
    few = [*texts[:2], *rows(58)]
    assert not [f for f in ids(tmp_path, config, few, ["pairs"]).findings if " hold " in f.symptom]
