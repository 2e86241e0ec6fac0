"""From manifests to batches: nothing lost, nothing twice, nothing wrong in silence."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.schema import ManifestError
from recipes.data import (
    CharEncoder, FeatureCache, ManifestBatches, collate, lhotse_loader, manifest_loader, read_audio, read_rows,
)
from tests.recipes.tiny import LABELS, RATE, corpus, write_audio, write_rows


def test_characters_become_their_positions():
    assert CharEncoder(LABELS)("ab z'") == [1, 2, 0, 26, 27]
    assert CharEncoder(LABELS)("") == []


def test_characters_that_no_label_spells_are_named_and_never_dropped():
    with pytest.raises(ValueError, match=r"\['H', 'W'\] of 'Hello World' .* lower-case the text"):
        CharEncoder(LABELS)("Hello World")
    with pytest.raises(ValueError, match=r"\['4', 'é'\]") as caught:
        CharEncoder(LABELS)("café 4")
    assert "lower-case" not in str(caught.value)


def test_collate_pads_on_the_right_and_keeps_lengths():
    audio = [np.arange(3, dtype=np.float32), np.ones(5, dtype=np.float32)]
    audio_BT, audio_lengths, targets_BS, target_lengths, ids = collate(audio, [[4, 5], []], ["x", "y"])
    assert audio_BT.tolist() == [[0, 1, 2, 0, 0], [1, 1, 1, 1, 1]] and audio_lengths.tolist() == [3, 5]
    assert targets_BS.tolist() == [[4, 5], [0, 0]] and target_lengths.tolist() == [2, 0] and ids == ["x", "y"]
    assert audio_BT.dtype == torch.float32 and targets_BS.dtype == torch.long


DURATIONS = st.lists(st.floats(0.05, 40.0), min_size=1, max_size=60)


@settings(max_examples=150, deadline=None)
@given(DURATIONS, st.floats(1.0, 200.0), st.integers(1, 16), st.integers(1, 4))
def test_batches_hold_each_utterance_once_longest_first_within_the_budget(durations, seconds, most, world_size):
    rows = [{"duration": duration} for duration in durations]
    seen = []
    for rank in range(world_size):
        groups = ManifestBatches(
            rows, RATE, batch_seconds=seconds, max_utterances=most, rank=rank, world_size=world_size
        ).groups
        flat = [i for group in groups for i in group]
        assert [durations[i] for i in flat] == sorted((durations[i] for i in flat), reverse=True)
        for group in groups:
            assert 1 <= len(group) <= most
            assert len(group) == 1 or len(group) * durations[group[0]] <= seconds * (1 + 1e-9)
        seen += flat
    assert sorted(seen) == list(range(len(rows)))


def test_loader_gives_audio_targets_ids_and_positions(tmp_path):
    rows = corpus(tmp_path)
    rows[0].pop("utterance")
    found = {}
    for (audio_BT, audio_lengths, targets_BS, target_lengths, ids), positions in manifest_loader(
        rows, RATE, CharEncoder(LABELS), batch_seconds=3.5
    ):
        for row, i in enumerate(positions):
            samples, _ = soundfile.read(rows[i]["audio_filepath"], dtype="float32")
            assert torch.equal(audio_BT[row, : audio_lengths[row]], torch.from_numpy(samples))
            assert not audio_BT[row, audio_lengths[row] :].any()
            text = "".join(LABELS[k] for k in targets_BS[row, : target_lengths[row]])
            assert text == rows[i]["text"] and ids[row] == f"u{i}"
            found[i] = True
    assert sorted(found) == list(range(len(rows)))


def test_every_rank_has_as_many_batches():
    rows = [{"duration": seconds, "text": "a"} for seconds in (9, 8, 7, 2, 1, 1, 1, 1, 1)]
    loaders = [manifest_loader(rows, RATE, batch_seconds=10, rank=rank, world_size=4) for rank in range(4)]
    groups = [loader.dataset.groups for loader in loaders]
    assert [sum(map(bool, own)) for own in groups] == [2, 2, 2, 1] and {len(own) for own in groups} == {2}
    assert sorted(i for own in groups for group in own for i in group) == list(range(9))


def test_offset_selects_segments_of_one_file_also_the_first(tmp_path):
    path = write_audio(tmp_path / "long.wav", 3.0)
    whole, _ = soundfile.read(path, dtype="float32")
    first = read_audio({"audio_filepath": str(path), "offset": 0.0, "duration": 1.0}, RATE)
    second = read_audio({"audio_filepath": str(path), "offset": 1.0, "duration": 0.5}, RATE)
    assert np.array_equal(first, whole[:RATE]) and np.array_equal(second, whole[RATE : RATE + RATE // 2])
    assert len(read_audio({"audio_filepath": str(path), "duration": 3.0}, RATE)) == 3 * RATE


def test_other_sample_rates_are_resampled(tmp_path):
    path = tmp_path / "tone.wav"
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * 440 * np.arange(44100) / 44100), 44100)
    samples = read_audio({"audio_filepath": str(path), "duration": 1.0}, RATE)
    assert abs(len(samples) - RATE) <= 1
    assert np.abs(np.fft.rfft(samples)).argmax() == pytest.approx(440, abs=1)


def test_audio_that_cannot_be_used_is_named(tmp_path):
    stereo = write_audio(tmp_path / "stereo.wav", 0.5, channels=2)
    text = tmp_path / "text.wav"
    text.write_text("this is no audio")
    empty = tmp_path / "empty.wav"
    soundfile.write(empty, np.zeros(0), RATE)
    bad = ((stereo, "2 channels"), (text, "cannot be read"), (empty, "no samples"), (tmp_path / "no.wav", "cannot"))
    for path, said in bad:
        with pytest.raises(RuntimeError, match=said) as caught:
            read_audio({"audio_filepath": str(path), "duration": 0.5}, RATE)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_rows_of_several_manifests_keep_their_order_and_resolve_relative_paths(tmp_path):
    for name in ("a", "b"):
        write_audio(tmp_path / name / "x.wav", 0.3)
        write_rows(tmp_path / name / "m.json", [{"audio_filepath": "x.wav", "duration": 0.3, "text": name}])
    rows = read_rows([tmp_path / "a" / "m.json", tmp_path / "b" / "m.json"])
    assert [row["text"] for row in rows] == ["a", "b"]
    assert [row["audio_filepath"] for row in rows] == [str(tmp_path / name / "x.wav") for name in ("a", "b")]
    assert read_rows(str(tmp_path / "a" / "m.json")) == rows[:1]
    (tmp_path / "a" / "m.json").write_text('{"audio_filepath": "x.wav"}\n')
    with pytest.raises(ManifestError, match="m.json:1: "):
        read_rows(tmp_path / "a" / "m.json")


def test_real_speech_is_read_as_soundfile_reads_it(librispeech_sample):
    path = sorted(librispeech_sample.rglob("*.flac"))[0]
    samples, rate = soundfile.read(path, dtype="float32")
    row = {"audio_filepath": str(path), "duration": len(samples) / rate}
    assert rate == RATE and np.array_equal(read_audio(row, RATE), samples)


def tiny_lhotse(manifest, batch_duration: float = 8.0):
    """NeMo's lhotse configuration of a manifest, or of several."""
    from omegaconf import OmegaConf

    return OmegaConf.create(
        {"use_lhotse": True, "manifest_filepath": manifest if isinstance(manifest, list) else str(manifest),
         "sample_rate": RATE, "batch_duration": batch_duration, "use_bucketing": False, "shuffle": True, "seed": 3,
         "shard_seed": 3, "num_workers": 0}
    )


@pytest.fixture(scope="module")
def lhotse_config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lhotse")
    rows = corpus(folder, seconds=[0.3 + 0.05 * (i % 9) for i in range(12)], sampling_rate=RATE)
    return tiny_lhotse(write_rows(folder / "train.json", rows), batch_duration=1.2)


def epoch(loader, number: int) -> list[list[str]]:
    loader.sampler.set_epoch(number)
    batches = []
    for batch in loader:
        loader.mark_trained()
        batches.append(batch[4])
    return batches


def test_training_batches_hold_each_utterance_once_and_change_with_the_epoch(lhotse_config):
    loader = lhotse_loader(lhotse_config, CharEncoder(LABELS), 0, 1)
    first, second = epoch(loader, 0), epoch(loader, 1)
    expected = sorted(f"u{i}" for i in range(12))
    assert sorted(i for batch in first for i in batch) == expected == sorted(i for batch in second for i in batch)
    assert first != second
    assert epoch(lhotse_loader(lhotse_config, CharEncoder(LABELS), 0, 1), 1) == second


def test_training_goes_on_in_the_middle_of_an_epoch(lhotse_config):
    whole = epoch(lhotse_loader(lhotse_config, CharEncoder(LABELS), 0, 1), 1)
    interrupted = lhotse_loader(lhotse_config, CharEncoder(LABELS), 0, 1)
    interrupted.sampler.set_epoch(1)
    for number, _ in enumerate(interrupted):
        if number == 2:
            break  # the third batch was loaded and not trained on
        interrupted.mark_trained()
    state = json.loads(json.dumps(interrupted.state_dict()))
    resumed = lhotse_loader(lhotse_config, CharEncoder(LABELS), 0, 1)
    resumed.load_state_dict(state)
    assert [batch[4] for batch in resumed] == whole[2:]


def test_batches_drawn_in_a_process_of_their_own_are_those_drawn_here(lhotse_config):
    """So they are with workers and several ranks; a resumed epoch too."""
    beside = lhotse_config.copy()
    beside.num_workers = 1
    for rank in range(2):
        here, there = (lhotse_loader(cfg, CharEncoder(LABELS), rank, 2) for cfg in (lhotse_config, beside))
        whole = epoch(here, 1)
        assert epoch(there, 1) == whole and len(whole) > 2
        assert there.sampler.diagnostics.kept_cuts == 0 < here.sampler.diagnostics.kept_cuts
        there.load_state_dict({"epoch": 1, "batches": 2})
        assert [batch[4] for batch in there] == whole[2:]


def test_cached_features_are_those_of_the_audio_and_are_computed_once(lhotse_config, monkeypatch):
    from nemo.collections.asr.modules import AudioToMelSpectrogramPreprocessor

    preprocessor = AudioToMelSpectrogramPreprocessor(sample_rate=RATE, features=20, pad_to=0)
    cached = lhotse_config.copy()
    cached.cache_features = True
    plain, kept = (
        lhotse_loader(cfg, CharEncoder(LABELS), 0, 1, preprocessor=preprocessor) for cfg in (lhotse_config, cached)
    )
    batches = list(plain)
    for audio, features in zip(batches, kept, strict=True):
        assert features[4] == audio[4] and torch.equal(features[2], audio[2])
        expected, lengths = preprocessor.eval()(input_signal=audio[0], length=audio[1])
        assert torch.equal(features[1], lengths)
        for row, length in enumerate(lengths):
            torch.testing.assert_close(
                features[0][row, :, :length], expected[row, :, :length], atol=5e-3, rtol=1e-3  # float16
            )
            assert features[0][row, :, length:].abs().sum() == 0
    monkeypatch.setattr("recipes.data.mono", lambda cut: pytest.fail("the audio is read again"))
    assert len(list(kept)) == len(batches) > 1


def test_the_cache_has_nothing_of_the_model_s_own_preprocessor(rng=np.random.default_rng(0)):
    """NeMo's featurizer holds a wrapped method of itself: a plain copy computes with the original's filters, dither and
    device."""
    from nemo.collections.asr.modules import AudioToMelSpectrogramPreprocessor

    preprocessor = AudioToMelSpectrogramPreprocessor(sample_rate=RATE, features=20, pad_to=0, dither=0.1).train()
    samples = rng.standard_normal(RATE).astype(np.float32) * 0.01
    first, second, third = (FeatureCache(preprocessor) for _ in range(3))
    preprocessor.featurizer.fb.mul_(torch.rand(20, 1) * 3)
    a, b = first("x", lambda: samples.copy()), second("x", lambda: samples.copy())
    assert torch.equal(a, b)  # no dither
    preprocessor.featurizer.fb.zero_()
    assert torch.equal(third("x", lambda: samples.copy()), a)


def test_validation_may_keep_its_features(tmp_path):
    from nemo.collections.asr.modules import AudioToMelSpectrogramPreprocessor

    preprocessor = AudioToMelSpectrogramPreprocessor(sample_rate=RATE, features=20, pad_to=0, dither=0.0).eval()
    rows = read_rows(write_rows(tmp_path / "rows.json", corpus(tmp_path)))
    plain = list(manifest_loader(rows, RATE, CharEncoder(LABELS), batch_seconds=2.5))
    loader = manifest_loader(rows, RATE, CharEncoder(LABELS), batch_seconds=2.5, cache=FeatureCache(preprocessor))
    for (audio, positions), (features, same) in zip(plain, loader, strict=True):
        assert positions == same and features[4] == audio[4] and torch.equal(features[2], audio[2])
        expected, lengths = preprocessor(input_signal=audio[0], length=audio[1])
        assert torch.equal(features[1], lengths)
        for row, length in enumerate(lengths):
            torch.testing.assert_close(features[0][row, :, :length], expected[row, :, :length], atol=5e-3, rtol=1e-3)
    for row in rows:
        Path(row["audio_filepath"]).unlink()
    assert len(list(loader)) == len(plain) > 1  # the audio is not read again


def test_training_goes_on_at_the_same_audio_where_a_step_is_of_more_batches_since(lhotse_config):
    loaders = []
    for seconds, trained in [(1.2, 4), (0.6, 0)]:
        cfg = lhotse_config.copy()
        cfg.batch_duration = seconds
        loaders.append(lhotse_loader(cfg, CharEncoder(LABELS), 0, 1))
        for _ in range(trained):
            loaders[-1].mark_trained()
    before, now = loaders
    now.load_state_dict(before.state_dict())
    assert now.state_dict()["batches"] == 8
    now.load_state_dict({"epoch": 0, "batches": 3})  # a checkpoint of before seconds were kept
    assert now.state_dict()["batches"] == 3


@pytest.mark.parametrize("fields", [{"sampling_rate": RATE}, {}])
def test_segments_of_a_file_are_trained_on_as_they_are_evaluated(tmp_path, fields, rng=np.random.default_rng(5)):
    """With `sampling_rate` NeMo 3.0.0 takes the segment's duration for the file's, and loses its beginning or all."""
    soundfile.write(tmp_path / "long.wav", rng.normal(0, 0.1, 4 * RATE), RATE, subtype="FLOAT")
    rows = [
        {"audio_filepath": "long.wav", "offset": offset, "duration": 0.75, "text": "a", "utterance": f"at{offset}", **fields}
        for offset in (0.0, 0.5, 0.505, 3.25)
    ]
    path = write_rows(tmp_path / "train.json", rows)
    expected = {row["utterance"]: read_audio(row, RATE) for row in read_rows(path)}
    batches = list(lhotse_loader(tiny_lhotse(path), CharEncoder(LABELS), 0, 1))
    found = {i: audio[:n].numpy() for batch in batches for audio, n, i in zip(batch[0], batch[1], batch[4])}
    assert found.keys() == expected.keys()
    for utterance, samples in expected.items():
        np.testing.assert_allclose(found[utterance], samples, atol=1e-6)


@pytest.mark.parametrize("fields", [{"sampling_rate": RATE}, {}])
def test_files_of_one_name_in_two_folders_keep_their_own_features(tmp_path, fields):
    from nemo.collections.asr.modules import AudioToMelSpectrogramPreprocessor

    rows = []
    for number, folder in enumerate(("one", "two")):
        (tmp_path / folder).mkdir()
        t = np.arange(RATE) / RATE
        soundfile.write(tmp_path / folder / "001.wav", 0.3 * np.sin(2 * np.pi * 400 * (1 + 3 * number) * t), RATE)
        rows.append({"audio_filepath": f"{folder}/001.wav", "duration": 1.0, "text": "a", "utterance": folder, **fields})
    config = tiny_lhotse(write_rows(tmp_path / "train.json", rows))
    config.cache_features = True
    preprocessor = AudioToMelSpectrogramPreprocessor(features=16, normalize=None, dither=0.0, pad_to=0)
    (features, *_, ids), *more = lhotse_loader(config, CharEncoder(LABELS), 0, 1, preprocessor=preprocessor)
    assert sorted(ids) == ["one", "two"] and not more
    assert (features[0].mean(dim=1).argmax() - features[1].mean(dim=1).argmax()).abs() > 2


@pytest.mark.parametrize("count", [1, 2, 3])
def test_several_manifests_are_one_corpus_with_an_end(tmp_path, count):
    """NeMo repeats each manifest of a list for ever."""
    paths = []
    for number in range(count):
        (tmp_path / str(number)).mkdir()
        rows = corpus(tmp_path / str(number), seconds=[0.4, 0.5, 0.6], sampling_rate=RATE)
        for row in rows:
            row["utterance"] = f"{number}{row['utterance']}"
        paths.append(str(write_rows(tmp_path / str(number) / "train.json", rows)))
    loader = lhotse_loader(tiny_lhotse(paths), CharEncoder(LABELS), 0, 1)
    expected = sorted(f"{number}u{i}" for number in range(count) for i in range(3))
    for number in range(2):
        assert sorted(i for batch in epoch(loader, number) for i in batch) == expected


def test_a_validation_utterance_of_one_frame_gets_a_second(tmp_path):
    write_audio(tmp_path / "a.wav", 0.012)
    path = write_rows(tmp_path / "dev.json", [{"audio_filepath": "a.wav", "duration": 0.012, "text": "a"}])
    ((batch, _),) = manifest_loader(read_rows(path), RATE, CharEncoder(LABELS))
    assert batch[1].tolist() == [320]


def test_training_stops_at_text_that_cannot_be_spelled_with_the_utterance_named(lhotse_config, tmp_path):
    rows = [json.loads(line) for line in open(lhotse_config.manifest_filepath)]
    rows[4]["text"] = "UPPER CASE"
    cfg = lhotse_config.copy()
    cfg.manifest_filepath = str(write_rows(tmp_path / "bad.json", rows))
    with pytest.raises(RuntimeError, match="utterance u4 cannot be trained on: .*lower-case the text"):
        list(lhotse_loader(cfg, CharEncoder(LABELS), 0, 1))


def test_training_stops_at_stereo_with_the_utterance_named(lhotse_config, tmp_path):
    rows = [json.loads(line) for line in open(lhotse_config.manifest_filepath)]
    rows[5]["audio_filepath"] = str(write_audio(tmp_path / "stereo.wav", rows[5]["duration"], channels=2))
    cfg = lhotse_config.copy()
    cfg.manifest_filepath = str(write_rows(tmp_path / "bad.json", rows))
    with pytest.raises(RuntimeError, match="utterance u5 cannot be trained on: 2 channels; make it mono"):
        list(lhotse_loader(cfg, CharEncoder(LABELS), 0, 1))


def test_padding_waste_of_sorted_batches_is_small():
    generator = np.random.default_rng(0)
    rows = [{"duration": float(d)} for d in np.exp(generator.normal(2.0, 0.6, 2000))]
    groups = ManifestBatches(rows, RATE, batch_seconds=240.0).groups
    padded = sum(len(group) * rows[group[0]]["duration"] for group in groups)
    assert padded / math.fsum(row["duration"] for row in rows) < 1.03
