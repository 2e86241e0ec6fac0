"""Augmentation of waveforms: synthetic rooms and noise, nothing to download.

Shapes: B batch, R rows of it that are changed, T samples, K bins of a Fourier transform.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from recipes.lengths import valid_mask

TALKERS = 3  # whose voices together are babble


class NoiseAndRooms(nn.Module):
    """Some utterances of a batch as if spoken in a room, some with noise behind them, drawn anew each time.

    A room's impulse response is the direct sound followed by Gaussian noise that decays by 60 dB in its reverberation
    time (Polack 1988; Habets' survey of room impulse responses calls it the statistical model), 0 to 12 dB below the
    direct sound in energy. Noise is coloured (power falling as 1/f^a, a from 0, white, to 2, brown) or, in half of the
    cases where the batch has enough of them, babble: other utterances of the batch on top of each other.

    Args:
        room_probability, noise_probability: shares of the utterances, each drawn for itself.
        reverberation_seconds: lowest and highest time of decay by 60 dB; small to large rooms have 0.2 to 0.6.
        snr_db: lowest and highest ratio of speech to noise in decibels, over the whole utterance.
        sample_rate: of the waveforms, in Hz.

    Raises ValueError for a probability outside 0 to 1 or a range whose ends are reversed.
    """

    def __init__(
        self,
        room_probability: float = 0.0,
        noise_probability: float = 0.0,
        reverberation_seconds: tuple[float, float] = (0.1, 0.5),
        snr_db: tuple[float, float] = (5.0, 25.0),
        sample_rate: int = 16000,
    ):
        super().__init__()
        for name, value in (("room_probability", room_probability), ("noise_probability", noise_probability)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name}={value!r}: must be from 0 to 1")
        low, high = reverberation_seconds
        if not 0.0 < low <= high:
            raise ValueError(f"reverberation_seconds={[low, high]}: must be two positive numbers, the lower one first")
        if not snr_db[0] <= snr_db[1]:
            raise ValueError(f"snr_db={list(snr_db)}: must be two numbers, the lower one first")
        self.room_probability, self.noise_probability = room_probability, noise_probability
        self.reverberation_seconds, self.snr_db = (low, high), tuple(snr_db)
        self.sample_rate = sample_rate

    @torch.no_grad()
    def forward(self, audio_BT: Tensor, lengths_B: Tensor) -> Tensor:
        """Waveforms (B, T) with lengths (B) in samples to the same; padding stays zero, noise adds to the loudness."""
        changes = ((self.room_probability, self._in_rooms), (self.noise_probability, self._with_noise))
        for probability, change in changes:
            if not probability or not audio_BT.shape[1]:
                continue
            chosen_B = torch.rand(len(audio_BT), device=audio_BT.device) < probability
            if audio_BT.is_cuda:  # which rows these are it would have to be waited for: all are changed
                changed_BT = change(audio_BT, lengths_B, torch.arange(len(audio_BT), device=audio_BT.device))
                audio_BT = torch.where(chosen_B[:, None], changed_BT, audio_BT)
            elif len(rows_R := chosen_B.nonzero().flatten()):
                audio_BT = audio_BT.index_copy(0, rows_R, change(audio_BT, lengths_B, rows_R))
        return audio_BT

    def _in_rooms(self, audio_BT: Tensor, lengths_B: Tensor, rows_R: Tensor) -> Tensor:
        """These rows (R, T) as if spoken in rooms."""
        audio_BT, lengths_B = audio_BT[rows_R], lengths_B[rows_R]
        items, samples = audio_BT.shape
        taps = int(self.reverberation_seconds[1] * self.sample_rate)
        decay_B1 = -math.log(1000.0) / (self._draw(items, self.reverberation_seconds, audio_BT) * self.sample_rate)
        tail_BT = torch.exp(decay_B1 * torch.arange(1, taps + 1, device=audio_BT.device)) * torch.randn(
            items, taps, device=audio_BT.device
        )
        below_B1 = 10 ** (-self._draw(items, (0.0, 12.0), audio_BT) / 20)
        tail_BT *= below_B1 / tail_BT.norm(dim=1, keepdim=True)
        response_BT = torch.cat((torch.ones_like(below_B1), tail_BT), dim=1)
        points = _quick(samples + taps)  # enough for the echo's end, which is cut off, not to come round to the beginning
        echo_BT = torch.fft.irfft(
            torch.fft.rfft(audio_BT.float(), points) * torch.fft.rfft(response_BT, points), points
        )[:, :samples]
        echo_BT = echo_BT * valid_mask(lengths_B, samples)
        return (echo_BT * (_level(audio_BT, lengths_B) / _level(echo_BT, lengths_B))).to(audio_BT.dtype)

    def _with_noise(self, audio_BT: Tensor, lengths_B: Tensor, rows_R: Tensor) -> Tensor:
        """These rows (R, T) with noise; babble is of the neighbours in the whole batch."""
        batch_BT, audio_BT, lengths_B = audio_BT, audio_BT[rows_R], lengths_B[rows_R]
        items, samples = audio_BT.shape
        noise_BT = self._coloured(items, samples, audio_BT)
        if len(batch_BT) > TALKERS:
            neighbours = (batch_BT[(rows_R - shift) % len(batch_BT)] for shift in range(1, TALKERS + 1))
            babble_BT = sum(neighbours).float()
            noise_BT = torch.where(torch.rand(items, 1, device=audio_BT.device) < 0.5, babble_BT, noise_BT)
        noise_BT = noise_BT * valid_mask(lengths_B, samples)
        gain_B1 = 10 ** (-self._draw(items, self.snr_db, audio_BT) / 20)
        gain_B1 = gain_B1 * _level(audio_BT, lengths_B) / _level(noise_BT, lengths_B)
        return (audio_BT + gain_B1 * noise_BT).to(audio_BT.dtype)

    def _coloured(self, items: int, samples: int, like: Tensor) -> Tensor:
        """(B, T) noise whose power falls as 1/f^a, flat below 50 Hz."""
        points = _quick(samples)
        spectrum_BK = torch.fft.rfft(torch.randn(items, points, device=like.device))
        hertz_K = torch.linspace(0, self.sample_rate / 2, spectrum_BK.shape[1], device=like.device).clamp(min=50.0)
        return torch.fft.irfft(spectrum_BK * hertz_K ** (-self._draw(items, (0.0, 2.0), like) / 2), points)[:, :samples]

    @staticmethod
    def _draw(items: int, ends: tuple[float, float], like: Tensor) -> Tensor:
        """(B, 1) uniform between the ends."""
        return ends[0] + (ends[1] - ends[0]) * torch.rand(items, 1, device=like.device)


def _quick(points: int) -> int:
    """At least so many points of a Fourier transform that has no large prime in it, and that comes again in other batches."""
    return -(-points // 8192) * 8192


def _level(audio_BT: Tensor, lengths_B: Tensor) -> Tensor:
    """(B, 1) root of the mean square over the valid samples, never 0."""
    return (audio_BT.float().square().sum(dim=1) / lengths_B.clamp(min=1)).sqrt().clamp(min=1e-8)[:, None]
