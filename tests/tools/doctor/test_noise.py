"""Audio that is noise and no speech, and speech in noise, which is speech. No torch."""

import numpy as np
import pytest

from tests.tools.doctor.setups import tones
from tools.doctor.audio import is_noise, measured
from tools.doctor.engine import examine

SPOKEN = [tones.speak(text, seed) for seed, text in enumerate(tones.sentences(16, 3))]
RATE = tones.RATE


def words(x):
    return np.round(x * 32767).astype("<i2")


def hiss(x, decibels):
    noise = np.random.default_rng(len(x)).standard_normal(len(x))
    return x + noise * np.sqrt((x**2).mean()) * 10 ** (-decibels / 20)


def mu_law(x):
    """Bytes of ITU-T G.711."""
    size = np.minimum(np.abs(words(x).astype(int)), 32635) + 132
    step = np.floor(np.log2(size)).astype(int) - 7
    return (~((x < 0) * 0x80 | step << 4 | size >> (step + 3) & 15) & 0xFF).astype(np.uint8)


def a_law(x):
    value = words(x).astype(int)
    size = np.where(value < 0, -value - 1, value)
    step = np.where(size < 256, 0, np.floor(np.log2(np.maximum(size, 1))).astype(int) - 7)
    part = size >> np.where(step > 0, step + 3, 4) & 15
    return ((step << 4 | part) ^ np.where(value < 0, 0x55, 0xD5)).astype(np.uint8)


def examined(folder, change, noisy=1.0, **options):
    """The report on a manifest whose first share of `noisy` went through `change`."""
    rows = tones.corpus(folder, count=20)
    some = [tones.rewrite(row, change(tones.samples(row)), folder / "other", suffix=".wav", **options)
            for row in rows[: round(noisy * len(rows))]]
    return examine(manifests={"train": tones.write(folder / "train.json", some + rows[len(some):])}, families=["audio"])


@pytest.mark.parametrize("change", [
    lambda x: x, lambda x: hiss(x, 10), lambda x: hiss(x, 0), lambda x: np.clip(50 * x, -1, 1), lambda x: x + 0.3,
    lambda x: np.concatenate([np.zeros(4 * len(x)), x]), lambda x: 0.002 * x, lambda x: x[: RATE // 2],
    lambda x: np.repeat(x, 3),
])
def test_speech_is_no_noise(change):
    assert not any(is_noise(measured(np.asarray(change(x)), RATE)) for x in SPOKEN)


@pytest.mark.parametrize("change", [
    lambda x: words(x).byteswap() / 32768, lambda x: 0.1 * np.random.default_rng(0).standard_normal(len(x)),
    lambda x: hiss(x, -10), lambda x: np.random.default_rng(0).uniform(-1, 1, len(x)),
    lambda x: words(x).view(np.uint16) / 32768 - 1,
])
def test_noise_is_noise(change):
    assert all(is_noise(measured(change(x), RATE)) for x in SPOKEN)


@pytest.mark.parametrize("change, reading, options", [
    (lambda x: words(x).byteswap(), "two bytes in the other order", {}),
    (lambda x: np.frombuffer(b"\0" + words(x).tobytes()[:-1], "<i2"), "two bytes in the other order", {}),
    (lambda x: words(x).view(np.uint16) / 32768 - 1, "unsigned 16-bit samples", {"subtype": "PCM_16"}),
    (lambda x: np.frombuffer(a_law(hiss(x, 15)).tobytes()[: len(x) // 2 * 2], "<i2"), "A-law", {}),
    (lambda x: mu_law(hiss(x, 15)) / 128 - 1, "mu-law", {"subtype": "PCM_U8"}),
    (lambda x: hiss(x, 40).astype("<f4").view("<i2"), "32-bit floats", {}),
    (lambda x: words(x).view(np.uint8) / 128 - 1, "each byte was taken for one", {"subtype": "PCM_U8"}),
])
def test_the_right_reading_is_named(tmp_path, change, reading, options):
    found = examined(tmp_path, change, **options).findings[0]
    assert (found.id, found.weight) == ("data-silence", "prevents") and found.symptom.startswith("20 of 20")
    assert reading in found.cause and "5 of 5" in found.evidence["speech in another reading"]


@pytest.mark.parametrize("share, weight", [(0.05, None), (0.3, "warning"), (0.6, "prevents")])
def test_the_weight_goes_by_the_share(tmp_path, share, weight):
    report = examined(tmp_path, lambda x: 0.1 * np.random.default_rng(0).standard_normal(len(x)), share)
    assert [(f.id, f.weight) for f in report.findings] == ([("data-silence", weight)] if weight else [])
    assert weight is None or report.findings[0].evidence["speech in another reading"].startswith("none of")
