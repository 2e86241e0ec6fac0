"""The families that look at manifests and audio. No torch."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from tests.recipes import tiny
from tools.doctor import languages, loading, pairs
from tools.doctor.causes import CUT_SHORT, name_causes
from tools.doctor.engine import examine
from tools.doctor.finding import Finding
from tools.doctor.registry import NotExamined
from tools.doctor.subject import Subject

FAMILIES = ["data", "audio", "pairs", "tokenizer"]
WORDS = "the cat sat on a mat and then it ran away to see what was there for food".split()


def text(i: int) -> str:
    return " ".join(WORDS[(i * 7 + j * 3) % len(WORDS)] for j in range(2 + i % 9))


@pytest.fixture(scope="module")
def audio(tmp_path_factory):
    """60 files of noise, as long as their text takes to say."""
    folder = tmp_path_factory.mktemp("audio")
    rows = []
    for i in range(60):
        seconds = round(0.3 + len(text(i)) / 25 * (1 + 0.05 * (i % 3)), 2)
        path = tiny.write_audio(folder / f"u{i}.wav", seconds, seed=i)
        rows.append({"audio_filepath": str(path), "duration": seconds, "text": text(i), "utterance": f"u{i}"})
    return rows


def manifest(folder, rows, name="train.json"):
    return str(tiny.write_rows(folder / name, rows))


def ids(folder, rows, families=FAMILIES, **more):
    manifests = {"train": manifest(folder, rows), **more}
    return examine(manifests=manifests, families=families)


def changed(rows, some, **fields):
    return [{**row, **{k: v(row) if callable(v) else v for k, v in fields.items()}} if i in some else dict(row)
            for i, row in enumerate(rows)]


def test_a_healthy_manifest_gives_nothing(audio, tmp_path):
    report = ids(tmp_path, audio)
    assert report.findings == [] and report.exit_code == 0
    assert {"data-upper-case", "data-mismatched-text", "data-clipped"} <= set(report.ruled_out)


@pytest.mark.parametrize("fault, fields, weight", [
    ("data-empty-text", {"text": ""}, "prevents"),
    ("data-duration-wrong", {"duration": lambda row: row["duration"] / 2}, "prevents"),
    ("data-duration-wrong", {"duration": lambda row: row["duration"] * 1000}, "prevents"),
    ("data-missing-audio", {"audio_filepath": "/nowhere/a.wav"}, "prevents"),
    ("data-sample-rate", {"sampling_rate": 8000}, "prevents"),
    ("data-manifest-broken", {"duration": "long"}, "prevents"),
])
def test_faults_of_lines(audio, tmp_path, fault, fields, weight):
    report = ids(tmp_path, changed(audio, range(40), **fields))
    assert report.ids[0] == fault and report.findings[0].weight == weight
    assert "train.json:" in report.findings[0].where and report.exit_code == 1


GERMAN = str.maketrans("aou", "äöü")
LABELS = {"model": {"labels": [" ", *"abcdefghijklmnopqrstuvwxyz'"]}}
CAPITALS = {"model": {"labels": [" ", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'"]}}


def cleaning(config, **options):
    """The configuration with NeMo's cleaning of texts on, as in `train_ds.normalize_transcripts: true`."""
    return {"model": {**config["model"], "train_ds": {"normalize_transcripts": True, **options}}}


@pytest.mark.parametrize("fault, change, config, weight", [
    ("data-upper-case", str.upper, LABELS, "prevents"),
    ("data-upper-case", str.upper, None, "warning"),  # whose labels may be capitals
    ("data-upper-case", str.capitalize, LABELS, "warning"),  # of each text NeMo drops one letter
    ("data-characters", lambda text: text + ".", LABELS, "warning"),
    ("data-characters", lambda text: text + "\x07", LABELS, "warning"),
    ("data-characters", lambda text: text + " 42", None, "warning"),
    ("data-characters", lambda text: text.translate(GERMAN), None, "warning"),
    ("data-characters", lambda text: text.translate(GERMAN), LABELS, "prevents"),
    ("data-characters", lambda text: "ж" * len(text), LABELS, "prevents"),
    (None, lambda text: f"{text.upper()}, 42!", cleaning(LABELS), None),
    ("data-characters", lambda text: text.upper() + ".", cleaning(LABELS, parser="base"), "warning"),
    ("data-upper-case", str.upper, cleaning(CAPITALS), "prevents"),  # which makes them lower case
    (None, str.upper, CAPITALS, None),
])
def test_texts_are_judged_by_the_share_of_characters_that_is_lost(audio, tmp_path, fault, change, config, weight):
    path = manifest(tmp_path, changed(audio, range(60), text=lambda row: change(row["text"])))
    report = examine(config=config, manifests={"train": path}, families=["data"])
    assert [(f.id, f.weight) for f in report.findings] == ([(fault, weight)] if fault else [])
    if fault and config is None:
        first = report.findings[0]
        assert "no configuration" in first.symptom and first.confidence < 0.7 and "--config" in first.fix[0]
    assert report.exit_code == (weight == "prevents")


def test_nemos_cleaning_is_what_its_parser_does():
    """Character by character but for numbers, which NeMo spells out."""
    parsers = pytest.importorskip("nemo.collections.common.parts.preprocessing.parsers")
    labels = LABELS["model"]["labels"]
    for name in ("base", "en", "ru"):
        nemo = parsers.make_parser(labels=labels, name=name, do_normalize=True)
        for said in ("HELLO,  World! - it's\u00a0fine", "Für Ästhetik; déjà vu", "Привет, мир"):
            assert loading.cleaned(said, name, set(labels)) == nemo._normalize(said)


def test_few_bad_texts_are_a_warning_and_counted(audio, tmp_path):
    report = ids(tmp_path, changed(audio, {3, 5}, text=lambda row: row["text"] + "!"))
    first = report.findings[0]
    assert (first.id, first.weight, first.evidence["utterances"]) == ("data-characters", "warning", 2)


def test_capital_labels_against_lower_case_texts(audio, tmp_path):
    config = {"model": {"labels": [" ", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ'"]}}
    report = examine(config=config, manifests={"train": manifest(tmp_path, audio)}, families=["data"])
    assert report.ids[0] == "data-upper-case" and report.exit_code == 1


def test_a_missing_text_field_is_an_empty_text(audio, tmp_path):
    rows = [{k: v for k, v in row.items() if k != "text"} for row in audio]
    assert ids(tmp_path, rows).ids == ["data-empty-text"]


def test_lines_that_are_no_json(audio, tmp_path):
    path = tmp_path / "list.json"
    path.write_text(json.dumps(audio, indent=1))
    report = examine(manifests={"train": str(path)}, families=FAMILIES)
    assert report.ids[0] == "data-manifest-broken" and report.exit_code == 1


@pytest.mark.parametrize("fields", [
    {"speaker": None}, {"gender": None, "lang": None}, {"offset": None}, {"sampling_rate": 16000.0}, {"speaker": 1.5},
])
def test_values_that_nemo_never_reads_break_no_line(audio, tmp_path, fields):
    path = manifest(tmp_path, changed(audio, {4}, **fields))
    for role in ("train", "test"):
        assert examine(manifests={role: path}, families=FAMILIES).findings == []
    subject = Subject(manifests={"train": path})
    subject.open(["data"])
    assert len(subject.rows["train"]) == 60 and None not in subject.rows["train"][4].values()


def test_the_readers_of_our_recipes_refuse_them(audio, tmp_path):
    ours = {**LABELS, "training": {"epochs": 1}}
    path = manifest(tmp_path, changed(audio, {4}, speaker=None))
    report = examine(config=ours, manifests={"train": path}, families=["data"])
    assert report.ids == ["data-manifest-broken"] and report.exit_code == 1
    assert "Our recipes refuse it" in report.findings[0].cause


@pytest.mark.parametrize("role, some, weight", [
    ("train", {4}, "prevents"), ("validation", {4}, "prevents"), ("test", {4}, "warning"),
    ("test", range(55), "prevents"),
])
def test_broken_lines_by_role(audio, tmp_path, role, some, weight):
    [found] = examine(manifests={role: manifest(tmp_path, changed(audio, some, duration="long"))},
                      families=["data"]).findings
    assert (found.id, found.weight) == ("data-manifest-broken", weight)


@pytest.mark.parametrize("offset, change", [
    (lambda i: {}, 'several rows name one recording: give each its "offset"'),
    (lambda i: {"offset": 300.0 * i + 1000}, '"offset" is in seconds'),
])
def test_stretches_of_long_recordings_are_told_to_say_where_they_begin(audio, tmp_path, offset, change):
    rows = [{**audio[i % 3], "duration": 0.3 + 0.005 * i, "text": f"text number {i}", **offset(i)} for i in range(60)]
    found = {f.id: f for f in ids(tmp_path, rows, families=["data"]).findings}
    assert found["data-duration-wrong"].fix[0].startswith(change)


@pytest.mark.parametrize("change, weight, far", [
    (lambda row: round(row["duration"] + 0.05, 2), "warning", 0),
    (lambda row: row["duration"] + 0.4 + 0.1 * row["duration"], "prevents", 60),
])
def test_durations_are_judged_by_how_far_they_are_off(audio, tmp_path, change, weight, far):
    [found] = ids(tmp_path, changed(audio, range(60), duration=change), families=["data"]).findings
    assert (found.id, found.weight, found.evidence["far off"]) == ("data-duration-wrong", weight, far)
    assert far or found.evidence["seconds off, at most"] == pytest.approx(0.05)


def rewritten(tmp_path, rows, change):
    """The rows with their audio changed: `change` takes samples to (samples, keywords for soundfile)."""
    out = []
    for row in rows:
        samples, rate = soundfile.read(row["audio_filepath"])
        path = tmp_path / (row["utterance"] + ".wav")
        samples, keywords = change(samples)
        soundfile.write(path, samples, keywords.pop("rate", rate), **keywords)
        out.append({**row, "audio_filepath": str(path)})
    return out


@pytest.mark.parametrize("fault, change", [
    ("data-silence", lambda x: (x * 0, {})),
    ("data-silence", lambda x: (np.random.default_rng(0).standard_normal(len(x)) * 3e-4, {"subtype": "FLOAT"})),
    ("data-clipped", lambda x: (np.clip(x * 6, -1, 1), {})),
    ("data-scale", lambda x: (x * 32768, {"subtype": "FLOAT"})),
    ("data-scale", lambda x: (0.2 * x + 0.4, {})),
    ("data-channels", lambda x: (np.stack([x, x], axis=1), {})),
    ("data-sample-rate", lambda x: (without_upper_half(x), {})),
])
def test_faults_of_audio(audio, tmp_path, fault, change):
    report = ids(tmp_path, rewritten(tmp_path, audio[:12], change))
    assert report.ids[0] == fault, [(f.id, f.symptom) for f in report.findings]


def test_peaks_a_little_above_full_scale_are_overshoot(audio, tmp_path):
    rows = rewritten(tmp_path, audio[:12], lambda x: (1.25 * x / np.abs(x).max(), {"subtype": "FLOAT"}))
    [found] = ids(tmp_path, rows).findings
    assert (found.id, found.weight) == ("data-scale", "warning") and "Overshoot" in found.cause
    assert "1.25 at most" in found.symptom


@pytest.mark.parametrize("options, fine", [
    ({}, False), ({"channel_selector": "average"}, True), ({"channel_selector": 1}, True),
    ({"channel_selector": 2}, False), ({"channel_selector": "average", "use_lhotse": True}, False),
    ({"channel_selector": 0, "use_lhotse": True}, True), ({"channel_selector": 0, "is_tarred": True}, False),
])
def test_a_section_that_chooses_a_channel_takes_stereo(audio, tmp_path, options, fine):
    rows = rewritten(tmp_path, audio[:12], lambda x: (np.stack([x, x], axis=1), {}))
    config = {"model": {**LABELS["model"], "train_ds": options}}
    report = examine(config=config, manifests={"train": manifest(tmp_path, rows)}, families=["data"])
    assert report.ids == ([] if fine else ["data-channels"]) and report.exit_code == (not fine)


def without_upper_half(x):
    """What is left of speech that was sent through a telephone, at the old sampling rate."""
    spectrum = np.fft.rfft(x)
    spectrum[len(spectrum) // 2 :] = 0
    return np.fft.irfft(spectrum, len(x))


def test_the_same_audio_twice_by_name_and_by_bytes(audio, tmp_path):
    assert ids(tmp_path, [*audio, audio[0]]).ids == ["data-duplicates"]
    copy = tmp_path / "copy.wav"
    shutil.copy(audio[0]["audio_filepath"], copy)
    rows = [*audio, {**audio[0], "audio_filepath": str(copy), "utterance": "other"}]
    assert ids(tmp_path, rows).ids == ["data-duplicates"]


@pytest.mark.parametrize("change, weight, wrong", [
    (lambda t: "quite other words are heard in here", "prevents", 30),
    (lambda t: t.upper() + "!", "warning", 0),  # the same text, spelt otherwise
])
def test_one_recording_with_two_texts(audio, tmp_path, change, weight, wrong):
    again = [{**row, "text": change(row["text"]), "utterance": f"v{row['utterance']}"} for row in audio[:30]]
    found = {f.id: f for f in ids(tmp_path, audio + again, families=["data"]).findings}["data-duplicates"]
    assert found.weight == weight and ("keep neither" in found.fix[0]) == bool(wrong)
    assert not wrong or f"at least {wrong} texts are not what is spoken" in found.symptom
    parts = [{**row, "offset": 0.1, "duration": 0.2, "text": change(row["text"])} for row in audio[:30]]
    rows = [{k: v for k, v in row.items() if k != "utterance"} for row in audio + parts]
    assert "data-duplicates" not in ids(tmp_path, rows, families=["data"]).ids  # other stretches of the same files


ENGLISH = ["the cat was on the table and it ate", "they had a boat which was not by the sea",
           "you will be there at ten"]
GERMAN_TEXTS = ["das ist nicht der hund von dem mann", "wir sind mit dem zug nach wien und es war kalt"]
NAMES = ["leonardo da vinci", "los angeles", "vincent van gogh", "rio de janeiro", "one two three"]


@pytest.mark.parametrize("texts, lang, found", [
    (ENGLISH * 20 + GERMAN_TEXTS * 4, None, (8, "German", "English")),
    (GERMAN_TEXTS * 30 + ENGLISH * 2, None, (6, "English", "German")),
    (ENGLISH * 20 + GERMAN_TEXTS * 4, "lang", None),  # the rows say so
    (ENGLISH * 20 + GERMAN_TEXTS * 2, None, None),  # four quotations
    (ENGLISH * 5 + GERMAN_TEXTS * 4, None, None),  # too few to know
    (ENGLISH * 20 + NAMES * 9, None, None),
    (["el hombre e o rio con las casas do pai que es uma"] * 60 + ["o rio do norte foi ao mar com um barco"] * 8, None,
     None),  # between two languages
    (["zzz kwa yule mtu ni mzuri sana"] * 60 + GERMAN_TEXTS * 4, None, None),  # unknown
])
def test_texts_in_another_language(texts, lang, found):
    rows = [{"text": t, "audio_filepath": "a.wav", "_at": f"t:{i}", **({"lang": t in ENGLISH} if lang else {})}
            for i, t in enumerate(texts)]
    try:
        said = list(languages.texts_are_in_one_language(SimpleNamespace(rows={"train": rows})))
    except NotExamined:
        said = []
    assert [(f.id, f.weight) for f in said] == [("data-mismatched-text", "warning")] * bool(found)
    if found:
        assert said[0].symptom.startswith(
            f"At least {found[0]} of {len(rows)} texts of train are {found[1]}, the others {found[2]}")


@pytest.mark.parametrize("change, said", [
    (lambda text: text, None), (lambda text: text[::-1], "written backwards"), (" ".join, "are single letters"),
    (lambda text: " ".join(text.replace(" ", "|")), "are single letters"), (str.upper, None),
])
def test_texts_that_are_no_words(change, said):
    rows = [{"text": change(text), "audio_filepath": "a.wav", "_at": f"t:{i}"} for i, text in enumerate(ENGLISH * 20)]
    found = list(languages.texts_are_words(SimpleNamespace(rows={"train": rows})))
    assert [f.id for f in found] == ["data-mismatched-text"] * bool(said)
    assert not said or said in found[0].symptom


@pytest.mark.parametrize("change, said", [
    (lambda text: text[::-1], "the same, written backwards"), (" ".join, "the same, spelt letter by letter"),
    (lambda text: text.replace(" ", ""), "without the spaces between words"), (lambda text: "other " + text[3:], None),
])
def test_texts_beside_the_audio_written_otherwise(audio, tmp_path, change, said):
    (tmp_path / "all.trans.txt").write_text("".join(f"{r['utterance']} {r['text'].upper()}\n" for r in audio))
    rows = []
    for row in audio:
        path = tmp_path / f"{row['utterance']}.wav"
        path.symlink_to(row["audio_filepath"])
        rows.append({**row, "audio_filepath": str(path), "text": change(row["text"])})
    found = [f for f in ids(tmp_path, rows, families=["pairs"]).findings if "transcripts beside" in f.symptom]
    assert (said is None) == (not found or not any(w in found[0].symptom for w in ("the same,",)))
    assert said is None or said in found[0].symptom and found[0].fix[0] not in pairs.FIX


def test_audio_under_another_name_by_a_link_is_the_same_audio(audio, tmp_path):
    link = tmp_path / "other.wav"
    link.symlink_to(audio[0]["audio_filepath"])
    report = ids(tmp_path, [*audio, {**audio[0], "audio_filepath": str(link), "utterance": "other"}])
    assert report.ids == ["data-duplicates"] and report.findings[0].evidence["utterances"] == 1


def test_leakage_by_path_by_bytes_and_by_manifest(audio, tmp_path):
    half = audio[:30]
    test = manifest(tmp_path, audio[25:], "test.json")
    assert "data-leakage" in ids(tmp_path, half, test=test).ids
    copies = []
    for row in audio[:5]:
        copy = tmp_path / f"copy_{row['utterance']}.wav"
        shutil.copy(row["audio_filepath"], copy)
        copies.append({**row, "audio_filepath": str(copy), "utterance": f"c{row['utterance']}"})
    assert "data-leakage" in ids(tmp_path, half, validation=manifest(tmp_path, copies, "dev.json")).ids
    same = manifest(tmp_path, half)
    assert examine(manifests={"train": same, "test": same}, families=FAMILIES).ids == ["data-leakage"]
    # what validation and test share with each other is in train nowhere
    some = manifest(tmp_path, audio[30:35], "some.json")
    rest = manifest(tmp_path, audio[30:], "rest.json")
    report = examine(manifests={"train": same, "validation": some, "test": rest}, families=FAMILIES)
    assert not [f.symptom for f in report.findings if "utterances of" in f.symptom]  # sentences of other recordings are


def shifted(rows):
    texts = [row["text"] for row in rows]
    return [{**row, "text": other} for row, other in zip(rows, texts[1:] + texts[:1])]


def test_of_next_to_silent_audio_nothing_is_said_of_its_band():
    from tools.doctor.audio import _no_upper_band

    assert _no_upper_band({"high": 1e-8, "rms": 0.1}) and _no_upper_band({"high": 1e-8, "rms": 1e-5})
    assert _no_upper_band({"high": 1e-6, "rms": 0.01})  # what rounding leaves
    assert not _no_upper_band({"high": 1e-3, "rms": 2e-6}) and not _no_upper_band({"high": 1e-3, "rms": 0.1})


def test_audio_that_was_cut_off_is_told_from_texts_of_other_audio(tmp_path):
    generator = np.random.default_rng(0)
    rows = [{"audio_filepath": f"/nowhere/{i}.wav", "duration": 1, "text": "word " * int(generator.integers(4, 40))}
            for i in range(400)]
    rows = [{**row, "duration": round(len(row["text"]) / 15 * float(generator.lognormal(0, 0.1)), 2)} for row in rows]
    cut = changed(rows, range(0, 400, 25), duration=0.4)
    other = [dict(row) for row in rows]
    some = generator.permutation(400)[:60]
    for a, b in zip(some, np.roll(some, 1)):
        other[a]["text"] = rows[b]["text"]
    assert ids(tmp_path, rows, ["pairs"]).findings == []
    one, two = (ids(tmp_path, some_rows, ["pairs"]).findings[0] for some_rows in (cut, other))
    assert (one.id, one.confidence, CUT_SHORT in one.evidence) == ("data-mismatched-text", 0.5, True)
    assert "far shorter than their texts take" in one.symptom and "cut off" in one.cause
    assert CUT_SHORT not in two.evidence and two.confidence == 0.7
    long = Finding("data-target-too-long", "warning", "x", "y", {"median fill": 0.4}, [], 0.9)
    assert [f.id for f in name_causes([one, long]) if f.weight == "warning"] == ["data-target-too-long", "data-mismatched-text"]
    assert [f.id for f in name_causes([two, long]) if f.weight == "warning"] == ["data-mismatched-text"]


def test_texts_shifted_by_a_line_are_told_by_length(audio, tmp_path):
    report = ids(tmp_path, shifted(audio))
    assert report.ids[0] == "data-mismatched-text" and report.exit_code == 1
    assert abs(report.findings[0].evidence["correlation"]) < 0.35


def test_texts_shifted_by_a_line_are_told_exactly_by_transcripts(audio, tmp_path):
    rows = rewritten(tmp_path, audio[:12], lambda x: (x, {}))
    (tmp_path / "all.trans.txt").write_text("".join(f"{r['utterance']} {r['text'].upper()}\n" for r in rows))
    assert "data-mismatched-text" not in ids(tmp_path, rows).ids
    first = ids(tmp_path, shifted(rows)).findings[0]
    assert first.id == "data-mismatched-text" and first.confidence == 1.0 and first.weight == "prevents"
    assert first.evidence["lines shifted by"] == -1 and "1 line too early" in first.symptom
    swapped = [dict(row) for row in rows]
    swapped[2]["text"], swapped[7]["text"] = rows[7]["text"], rows[2]["text"]
    first = ids(tmp_path, swapped).findings[0]
    assert (first.id, first.weight, first.evidence["wrong"]) == ("data-mismatched-text", "warning", 2)


def made_up(count, seed=0):
    """Rows of speech as LibriSpeech has it: lengths of text over a wide range, 15 characters a second, 10 % spread."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        length = int(np.exp(generator.normal(4.8, 0.5)))
        seconds = length / 15 * np.exp(generator.normal(0, 0.1))
        rows.append({"duration": float(seconds), "text": ("word " * length)[:length], "_at": f"t:{i + 1}"})
    return rows


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_a_part_of_the_pairs_is_told_by_a_mixture(share):
    rows = made_up(600)
    residual, random_pairs = pairs.residuals(rows, np.log([row["duration"] for row in rows]))
    assert pairs.mixture(residual, random_pairs)[1] < 5  # healthy
    some = np.random.default_rng(1).choice(600, int(600 * share), replace=False)
    texts = [rows[i]["text"] for i in some]
    for i, other in zip(some, texts[1:] + texts[:1]):
        rows[i]["text"] = other
    residual, random_pairs = pairs.residuals(rows, np.log([row["duration"] for row in rows]))
    found, gain = pairs.mixture(residual, random_pairs)
    assert gain > 12 and 0.4 * share < found < 1.3 * share


def test_utterances_cut_to_about_one_length_are_no_mismatch():
    """Of LibriSpeech between 11 and 17 s the correlation is 0.56: rates of speech are what differs."""
    generator = np.random.default_rng(0)
    seconds = generator.uniform(11, 17, 190)
    rows = [{"duration": float(s), "text": "a" * int(15 * s * np.exp(generator.normal(0, 0.16))), "_at": f"t:{i + 1}"}
            for i, s in enumerate(seconds)]
    assert list(pairs.lengths_go_together(SimpleNamespace(rows={"train": rows}))) == []
    texts = [row["text"] for row in rows]
    mixed = [{**row, "text": text} for row, text in zip(rows, texts[1:] + texts[:1])]
    [found] = pairs.lengths_go_together(SimpleNamespace(rows={"train": mixed}))
    assert found.id == "data-mismatched-text"


@pytest.mark.parametrize("rule, missing", [
    (lambda text: " ".join(text.replace(" ", "")), []),  # letters apart
    (lambda text: text.replace(" ", ""), [" "]),
    (lambda text: text.replace("'", ""), ["'"]),
    (lambda text: text, None),
])
def test_validation_that_is_spelt_by_other_rules(rule, missing):
    texts = [f"{text(i)} isn't that {text(i + 5)}" for i in range(60)]
    found = list(pairs.validation_is_spelt_as_train(SimpleNamespace(
        labels=None, manifests={"validation": ["dev.json"]},
        rows={"train": [{"text": t} for t in texts], "validation": [{"text": rule(t)} for t in texts[::-1]]})))
    assert [(f.id, f.weight) for f in found] == [("metric-normalisation", "warning")] * (missing is not None)
    assert missing is None or found[0].evidence["only in one of them"] == missing


def test_a_manifest_that_is_not_there_cannot_be_examined(tmp_path):
    report = examine(manifests={"train": str(tmp_path / "no.json")}, families=FAMILIES)
    assert report.exit_code == 2 and report.ids == ["data-manifest-broken"] and "no.json" in report.verdict


def test_labels_and_tokenizer(audio, tmp_path):
    config = {"model": {"labels": ["a", "a", "True"], "decoder": {"vocabulary": ["a", "a", "True"], "num_classes": 5}}}
    report = examine(config=config, manifests={"train": manifest(tmp_path, audio)}, families=["tokenizer"])
    symptoms = " ".join(f.symptom for f in report.findings)
    assert set(report.ids) == {"tokenizer-vocabulary"} and "twice" in symptoms and "num_classes is 5" in symptoms
    from manifests.tokenizer import train

    train([tmp_path / "train.json"], tmp_path / "tok", vocab=30)
    config = {"model": {"tokenizer": {"dir": str(tmp_path / "tok"), "type": "bpe"}}}
    assert examine(config=config, manifests={"train": manifest(tmp_path, audio)}, families=["tokenizer"]).findings == []
    loud = changed(audio, range(60), text=lambda row: row["text"].upper())
    report = examine(config=config, manifests={"train": manifest(tmp_path, loud)}, families=["tokenizer"])
    assert report.ids[0] == "data-upper-case"
    config["model"]["tokenizer"]["dir"] = str(tmp_path / "none")
    report = examine(config=config, manifests={"train": manifest(tmp_path, audio)}, families=["tokenizer"])
    assert report.ids == ["tokenizer-vocabulary"] and report.exit_code == 1


def test_real_speech_is_healthy_and_a_shift_of_it_is_not(librispeech_sample, tmp_path):
    from manifests.librispeech import build_rows, list_subsets

    rows = []
    for subset in list_subsets(librispeech_sample):
        built = build_rows(librispeech_sample, subset)
        rows += built[0] if isinstance(built, tuple) else built
    report = ids(tmp_path, rows)
    assert [f.id for f in report.findings if f.weight != "note"] == []
    assert ids(tmp_path, shifted(rows)).ids[0] == "data-mismatched-text"


def test_data_is_examined_without_torch(audio, tmp_path):
    path = manifest(tmp_path, audio)
    code = ("import sys; from tools.doctor.__main__ import main;"
            f"assert main(['check', '--train', {path!r}, '--only', 'data']) == 0; assert 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Nothing found that prevents learning")
