"""Synthetic rooms and noise on waveforms."""

import math

import pytest
import torch

from recipes.noise import NoiseAndRooms, _level


@pytest.fixture
def speech():
    """Eight waveforms in bursts, of two lengths, zero beyond them: audio (B, T), lengths (B)."""
    torch.manual_seed(0)
    bursts = (torch.arange(16000) // 1600 % 2).float()
    lengths = torch.tensor([16000, 12000] * 4)
    return torch.randn(8, 16000) * 0.1 * bursts * (torch.arange(16000) < lengths[:, None]), lengths


def test_without_a_probability_nothing_changes(speech):
    assert NoiseAndRooms()(*speech) is speech[0]


@pytest.mark.parametrize("probabilities", [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_padding_stays_zero_and_the_audio_that_came_is_left_alone(speech, probabilities):
    audio, lengths = speech
    before = audio.clone()
    out = NoiseAndRooms(*probabilities)(audio, lengths)
    assert torch.equal(audio, before) and out.shape == audio.shape and out.dtype == audio.dtype
    assert not out[1::2, 12000:].any() and torch.isfinite(out).all()
    assert all(not torch.equal(a, b) for a, b in zip(out, audio))


def test_only_the_share_asked_for_is_changed(speech):
    audio, lengths = (t.repeat(50, *[1] * (t.ndim - 1)) for t in speech)
    changed = (NoiseAndRooms(noise_probability=0.3)(audio, lengths) != audio).any(dim=1).float().mean()
    assert 0.2 < changed < 0.4


def test_noise_is_as_loud_as_was_asked(speech):
    audio, lengths = speech
    for decibels in (0.0, 20.0):
        noise = NoiseAndRooms(noise_probability=1.0, snr_db=(decibels, decibels))(audio, lengths) - audio
        ratio = 20 * torch.log10(_level(audio, lengths) / _level(noise, lengths))
        torch.testing.assert_close(ratio, torch.full((8, 1), decibels), atol=0.01, rtol=0)


def test_a_room_fills_pauses_keeps_loudness_and_moves_nothing(speech):
    audio, lengths = speech
    out = NoiseAndRooms(room_probability=1.0, reverberation_seconds=(0.4, 0.4))(audio, lengths)
    torch.testing.assert_close(_level(out, lengths), _level(audio, lengths))
    assert not audio[:, 3200:4800].any() and out[:, 3200:4800].abs().mean() > 0.001
    assert not out[:, :1600].abs().gt(1e-5).any()  # no echo before the sound, also not from the end of the waveform
    for a, b in zip(audio, out):
        delay = torch.fft.irfft(torch.fft.rfft(b) * torch.fft.rfft(a).conj()).argmax()
        assert int(delay) == 0


def test_an_echo_decays_by_60_decibels_in_its_time():
    click = torch.zeros(64, 16000)
    click[:, 0] = 1.0
    torch.manual_seed(0)
    out = NoiseAndRooms(1.0, reverberation_seconds=(0.3, 0.3))(click, torch.full((64,), 16000))
    early, late = (out[:, a : a + 800].square().mean() for a in (400, 400 + 2400))
    assert 10 * math.log10(early / late) == pytest.approx(30.0, abs=1.0)  # half the time


def test_a_silent_or_empty_batch_stays_finite():
    augment = NoiseAndRooms(1.0, 1.0)
    assert torch.isfinite(augment(torch.zeros(5, 800), torch.tensor([800, 1, 0, 5, 9]))).all()
    assert augment(torch.zeros(2, 0), torch.tensor([0, 0])).shape == (2, 0)


@pytest.mark.parametrize(
    "wrong", [dict(room_probability=1.5), dict(noise_probability=-0.1), dict(reverberation_seconds=(0.5, 0.1)),
              dict(reverberation_seconds=(0.0, 0.1)), dict(snr_db=(20, 5))],
)
def test_what_cannot_be_is_one_line_with_the_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        NoiseAndRooms(**wrong)
