"""Texts that lost something, and stretches of recordings by another clock: told from manifests alone."""

import random

import pytest

from tests.recipes import tiny
from tools.doctor.engine import examine

WORDS = ("the and of to that was with his for it house river stone walked under over bright morning children answered nothing "
         "again before window garden letter captain silence carried slowly toward evening").split()


def rows(count=80, least=32, most=48, seed=0):
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, weights=[4] * 10 + [1] * (len(WORDS) - 10), k=draw.randint(least, most)))
             for _ in range(count)]
    return [{"audio_filepath": f"/there/u{seed}-{i}.wav", "duration": round(len(text) / 15, 2), "text": text}
            for i, text in enumerate(texts)]


def found(folder, train):
    manifests = {"train": str(tiny.write_rows(folder / "train.json", train)),
                 "validation": str(tiny.write_rows(folder / "dev.json", rows(seed=1)))}
    return [f.symptom for f in examine(manifests=manifests, families=["pairs"]).findings]


def changed(change, some=1):
    return [{**row, "text": change(row["text"])} if i % some == 0 else row for i, row in enumerate(rows())]


def test_whole_texts_give_nothing(tmp_path):
    assert found(tmp_path, rows()) == []


@pytest.mark.parametrize("change, some, said", [
    (lambda text: text[:100], 1, "have exactly 100 characters, and none has more"),
    (lambda text: " ".join(text.split()[:20]), 1, "have exactly 20 words, and none has more"),
    (lambda text: text.replace(" ", ""), 3, "27 of 80 texts of train have 25 letters and more and no space"),
    (lambda text: " ".join(w for w in text.split() if w not in WORDS[:10]), 1, "0% are small words of English"),
], ids=["characters", "words", "spaces", "small words"])
def test_what_was_lost_is_said(tmp_path, change, some, said):
    assert any(said in symptom for symptom in found(tmp_path, changed(change, some)))


def test_words_through_a_set(tmp_path):
    draw = random.Random(3)
    many = [f"w{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(200)]
    train = [{**row, "text": " ".join(sorted(draw.sample(many, 34)))} for row in rows()]
    symptoms = found(tmp_path, train)
    assert any("no word stands twice, and all stand by the alphabet" in symptom for symptom in symptoms), symptoms


@pytest.mark.parametrize("clock, said", [(44100 / 48000, "begin 0.919 times their duration apart"), (1.0, None)])
def test_offsets_by_another_clock(tmp_path, clock, said):
    train, at = [], 0.0
    for i, row in enumerate(rows(60)):
        at = 0.0 if i % 20 == 0 else at
        train.append({**row, "audio_filepath": f"/there/long{i // 20}.wav", "offset": round(at * clock, 3)})
        at += row["duration"]
    symptoms = found(tmp_path, train)
    assert any(said in symptom for symptom in symptoms) if said else not symptoms, symptoms
