"""From the synthesizer's samples to a corpus utterance: resample, trim, colour, level, background noise, FLAC.

Signals are float32 or float64 arrays of shape (T,), full scale 1.0. Everything random comes from the generator
passed in, so an utterance is a function of its plan alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 16000
FRAME = SAMPLE_RATE // 100  # 10 ms
PEAK = 0.89  # -1 dBFS
FRAMES_PER_SECOND = 25.0  # CTC output at 4x subsampling of a 10 ms hop
MAX_FILL = 0.8  # at most this share of the CTC output frames is needed by characters and doubled letters


def ctc_symbols(text: str) -> int:
    """CTC output frames that ``text`` needs at least: its characters and one blank in each pair of equal neighbours."""
    return len(text) + sum(a == b for a, b in zip(text, text[1:]))


def fits_ctc(text: str, samples: int) -> bool:
    """Whether ``samples`` at 16 kHz leave room for ``text`` at 25 output frames a second, with a fifth to spare."""
    return ctc_symbols(text) <= MAX_FILL * FRAMES_PER_SECOND * samples / SAMPLE_RATE


def trim(signal_T: np.ndarray, lead: float, tail: float, floor_db: float = -45.0) -> np.ndarray:
    """Cut the silence before and after the speech to exactly ``lead`` and ``tail`` seconds (zeros where it was less).

    Speech is where the RMS of a 10 ms frame is over ``floor_db`` relative to the loudest frame.

    Raises ValueError when there is no speech in the signal.
    """
    frames = len(signal_T) // FRAME
    rms = np.sqrt(np.mean(np.square(signal_T[: frames * FRAME].reshape(frames, FRAME)), axis=1)) if frames else []
    if not len(rms) or not np.max(rms) > 0:
        raise ValueError("the synthesizer returned silence")
    loud = np.flatnonzero(rms > np.max(rms) * 10 ** (floor_db / 20))
    first, last = loud[0] * FRAME, (loud[-1] + 1) * FRAME
    lead_n, tail_n = round(lead * SAMPLE_RATE), round(tail * SAMPLE_RATE)
    padded = np.concatenate([np.zeros(lead_n), signal_T, np.zeros(tail_n)])
    return padded[first : last + lead_n + tail_n]


def tilt(signal_T: np.ndarray, slope: float) -> np.ndarray:
    """A first-order filter y[t] = x[t] + slope * x[t-1]: another microphone (positive: duller, negative: brighter)."""
    out = signal_T.copy()
    out[1:] += slope * signal_T[:-1]
    return out


def room_noise(length: int, rng: np.random.Generator) -> np.ndarray:
    """Noise of unit RMS whose power falls with frequency (between white and pink), as fans and streets have it."""
    size = 1 << max(length - 1, 1).bit_length()
    spectrum = np.fft.rfft(rng.standard_normal(size, dtype=np.float32))
    spectrum *= (np.arange(len(spectrum), dtype=np.float32) + size / 256) ** np.float32(-rng.uniform(0.2, 0.6))
    noise = np.fft.irfft(spectrum, size)[:length]
    return noise / np.sqrt(np.mean(np.square(noise)))


def finish(samples_T: np.ndarray, rate: int, job: dict) -> np.ndarray:
    """One utterance as 16 kHz int16 from raw int16 ``samples_T`` at ``rate`` Hz.

    ``job`` holds ``lead`` and ``tail`` (s), ``slope``, ``level`` (dBFS RMS), ``snr`` (dB) and ``seed``.
    """
    rng = np.random.default_rng(job["seed"])
    signal_T = soxr.resample(samples_T.astype(np.float32) / 32768, rate, SAMPLE_RATE, quality="HQ").astype(np.float64)
    signal_T = tilt(trim(signal_T, job["lead"], job["tail"]), job["slope"])
    rms = np.sqrt(np.mean(np.square(signal_T)))
    signal_T *= 10 ** (job["level"] / 20) / rms
    signal_T += room_noise(len(signal_T), rng) * 10 ** ((job["level"] - job["snr"]) / 20)
    signal_T *= min(1.0, PEAK / np.max(np.abs(signal_T)))
    return np.round(signal_T * 32767).astype(np.int16)


def write_flac(path: Path, samples_T: np.ndarray) -> None:
    """16 kHz, mono, 16-bit FLAC. The caller writes into a folder that is not yet under its final name."""
    soundfile.write(path, samples_T, SAMPLE_RATE, subtype="PCM_16", format="FLAC")
