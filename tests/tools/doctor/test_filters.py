"""Options that leave rows out, epochs of a number of batches, averages that do not follow, rates of texts without spaces;
and what is looked at of very many rows. No torch.
"""

import random
from types import SimpleNamespace

import pytest

from manifests.tokenizer import train as train_tokenizer
from tests.recipes import tiny
from tools.doctor import audio, headers, languages
from tools.doctor.engine import examine
from tools.doctor.headers import Headers, estimated_lines

LABELS = [" ", *"abcdefghijklmnopqrstuvwxyz'"]


def rows(count=400, text="some words are here", **fields):
    return [{"audio_filepath": f"/there/u{i}.wav", "duration": 2.0, "text": f"{text} {chr(97 + i % 26)}", **fields}
            for i in range(count)]


def found(folder, fault, train_ds=None, trainer=None, train=None, **more):
    """Findings of a fault by the checks of limits."""
    path = str(tiny.write_rows(folder / "t.json", rows() if train is None else train))
    model = {"labels": LABELS, "train_ds": {"batch_size": 4, **(train_ds or {})}, **more.pop("model", {})}
    config = {"model": model, "trainer": {"devices": 1, **(trainer or {})}, **more}
    report = examine(config=config, manifests={"train": path}, families=["limits"])
    return [finding for finding in report.findings if finding.id == fault]


@pytest.mark.parametrize("options, said", [
    ({"max_utts": 100}, "max_utts=100 takes the first 100 of the 400 utterances"), ({"max_utts": 0}, None),
    ({"max_utts": 5000}, None), ({"max_utts": 100, "use_lhotse": True}, None), ({"max_utts": 100, "is_tarred": True}, None),
])
def test_a_number_of_utterances_left_from_a_trial(tmp_path, options, said):
    told = found(tmp_path, "data-filtered", options)
    assert [finding.weight for finding in told] == ["warning"] * bool(said)
    assert not said or said in told[0].symptom and told[0].fix == ["take model.train_ds.max_utts out"]


@pytest.mark.parametrize("share, lhotse, weight", [
    (1.0, True, "prevents"), (0.7, True, "warning"), (0.2, True, None), (1.0, False, None),
])
def test_rows_that_are_to_be_skipped(tmp_path, share, lhotse, weight):
    train = [{**row, "_skipme": i < share * 400} for i, row in enumerate(rows())]
    assert [f.weight for f in found(tmp_path, "data-filtered", {"use_lhotse": lhotse}, train=train)] == [weight] * bool(weight)


@pytest.mark.parametrize("options, weight", [({"max_tps": 1}, "prevents"), ({"min_tps": 50}, "prevents"), ({"max_tps": 60}, None),
                                             ({"max_tps": 1, "pretokenize": False}, None)])
def test_limits_of_tokens_a_second(tmp_path, options, weight):
    train_tokenizer([tiny.write_rows(tmp_path / "t.json", rows())], tmp_path / "bpe", vocab=40)
    pieces = {"tokenizer": {"type": "bpe", "dir": str(tmp_path / "bpe")}}
    told = found(tmp_path, "data-filtered", {"use_lhotse": True, **options}, model=pieces)
    assert [finding.weight for finding in told] == [weight] * bool(weight)
    assert not found(tmp_path, "data-filtered", {"use_lhotse": True, **options})  # of characters NeMo counts none


@pytest.mark.parametrize("trainer, train_ds, trial", [
    ({"limit_train_batches": 2, "max_steps": 5000}, {"shuffle": True}, True),
    ({"limit_train_batches": 60, "max_epochs": 200}, {"shuffle": True}, False),
    ({"limit_train_batches": 60, "max_steps": 5000}, {"shuffle": True}, False),
    ({"limit_train_batches": 60, "max_epochs": 1}, {"shuffle": True}, True),
    ({"limit_train_batches": 60, "max_epochs": 200}, {"shuffle": False}, True),
    ({"limit_train_batches": 60, "max_epochs": 1}, {"use_lhotse": True}, False),
])
def test_an_epoch_of_a_number_of_batches_is_no_trial(tmp_path, trainer, train_ds, trial):
    assert len(found(tmp_path, "data-filtered", {"batch_size": 2, **train_ds}, trainer)) == trial


@pytest.mark.parametrize("ema, weight", [
    ({"enable": True, "decay": 0.9999}, "prevents"), ({"enable": True, "decay": 0.9995}, "warning"),
    ({"enable": True, "decay": 0.99, "every_n_steps": 100}, "prevents"), ({"enable": True}, None),
    ({"enable": True, "decay": 0.9999, "validate_original_weights": True}, "warning"), ({"enable": False, "decay": 0.9999}, None),
])
def test_an_average_that_does_not_follow_within_the_run(tmp_path, ema, weight):
    told = found(tmp_path, "ema-too-slow", trainer={"max_steps": 4000}, exp_manager={"ema": ema})
    assert [finding.weight for finding in told] == [weight] * bool(weight)
    if told:
        key, value = told[0].fix[0].split("=")
        better = {**ema, "decay": float(value)}
        assert key == "exp_manager.ema.decay"
        assert not found(tmp_path, "ema-too-slow", trainer={"max_steps": 4000}, exp_manager={"ema": better})


MANDARIN = "今天天气很好我们去公园"


@pytest.mark.parametrize("text, use_cer, advice", [
    (MANDARIN, False, "model.use_cer=true"), (MANDARIN, True, None), ("some words are here", True, "model.use_cer=false"),
    ("some words are here", False, None),
])
def test_texts_without_spaces_have_a_rate_of_characters(tmp_path, text, use_cer, advice):
    train = [{**row, "text": text} for row in rows()]
    told = found(tmp_path, "metric-normalisation", train=train, model={"use_cer": use_cer})
    assert [finding.fix[0] for finding in told] == [advice] * bool(advice)


# ---- very many rows --------------------------------------------------------------------------------------------

def subject(seconds):
    left = iter(seconds)
    return SimpleNamespace(seed=1, seconds_left=lambda: next(left))


def test_of_many_rows_some_are_looked_at(tmp_path, monkeypatch):
    path = str(tiny.write_rows(tmp_path / "t.json", rows(2000)))
    assert estimated_lines(path) == pytest.approx(2000, rel=0.05)
    every = Headers(subject([60.0] * 2001), [path])
    assert all(every(path) for _ in range(2000)) and every.said == ""
    monkeypatch.setattr(headers, "MOST", 500)
    some = Headers(subject([60.0] * 2001), [path])
    looked = sum(some(path) for _ in range(2000))
    assert 400 < looked < 600 and some.passed[path] == 2000 - looked
    assert some.said == f"the audio of {looked} of 2000 rows was looked for and its headers read, drawn at random"
    late = Headers(subject([60.0] * 101 + [29.0] * 1900), [path])
    assert sum(late(path) for _ in range(2000)) <= 100 and "half of the time was over" in late.said


def test_what_is_not_looked_at_is_said_and_shares_are_of_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(headers, "MOST", 100)
    path = str(tiny.write_rows(tmp_path / "t.json", rows(2000)))
    report = examine(manifests={"train": path}, families=["data"])
    [finding] = [f for f in report.findings if f.id == "data-missing-audio"]
    looked = finding.evidence["missing"]
    assert 60 < looked < 140 and f"{looked} of {looked} utterances" in finding.symptom
    assert any(f"{looked} of 2000 rows" in line for line in report.not_examined)


def test_of_many_texts_some_are_read(monkeypatch):
    monkeypatch.setattr(languages, "MOST", 100)
    assert len(languages.some(rows(1001))) <= 100 and languages.some([]) == [] and len(languages.some(rows(100))) == 100
    monkeypatch.setattr(languages, "plain_words", lambda text: read.append(text) or text.split())
    read = []
    list(languages.texts_are_words(SimpleNamespace(rows={"train": rows(1001)})))
    assert 0 < len(read) <= 100


def test_files_are_compared_up_to_a_number_of_bytes(tmp_path):
    draw, train = random.Random(0), []
    for i in range(40):
        (tmp_path / f"u{i}").write_bytes(draw.randbytes(1000))
        train.append({"audio_filepath": str(tmp_path / f"u{i}"), "duration": 1.0, "text": "a", "_at": f"t:{i}"})
    (tmp_path / "u39").write_bytes((tmp_path / "u0").read_bytes())
    pairs, left = audio.same_audio(train)
    assert [(a["_at"], b["_at"]) for a, b in pairs] == [("t:0", "t:39")] and left == 0
    assert audio.same_audio(train, most=10_000) == ([], 29)
