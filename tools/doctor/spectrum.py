"""What of the sound reaches the features: all of its time, and of its spectrum what tells speech apart, 300 to 3400 Hz."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tools.doctor.features import front_end
from tools.doctor.finding import Finding, Plot
from tools.doctor.probe import Item, untouched
from tools.doctor.registry import NotExamined, check

SPEECH = ((300, 1000), (1000, 2000), (2000, 3400))  # Hz: what a telephone lets through, in three
ABOVE = (4000, 7500)  # Hz, only to compare with
SECONDS = 2.4
SWITCH = 0.4  # seconds, of which a band is there for the first half
CLICKS, CLICK, SKIPPED = 40, 0.002, 0.15  # how many, seconds of each, and the share that may leave no trace
SILENT = 0.1  # of the largest change, under which a band does not reach the features


@check("features", faults=("features-bad",), needs=("model",))
def speech_bands_arrive(subject):
    """What distinguishes speech sounds, 300 to 3400 Hz, reaches the features."""
    probe = subject.probe
    rate = probe.sample_rate
    bands = [band for band in (*SPEECH, ABOVE) if band[1] < rate / 2]
    noise = 0.1 * torch.randn(int(SECONDS * rate), generator=torch.Generator().manual_seed(0))
    moved = []
    with untouched(probe.model), torch.no_grad():
        still, lengths = front_end(probe, [Item(noise.numpy())])
        for low, high in bands:
            x, _ = front_end(probe, [Item(_without(noise, rate, low, high).numpy())])
            if x.shape != still.shape:
                raise NotExamined("the front end gives other frames for other audio of the same length")
            moved.append(float((x - still)[0, :, : int(lengths[0])].abs().mean()))
    most = max(moved)
    if not math.isfinite(most) or most <= 1e-6:
        raise NotExamined("no change of the spectrum shows in the features")
    shares = {f"{low} to {high} Hz": value / most for (low, high), value in zip(bands, moved)}
    lost = [name for name, band in zip(shares, bands) if band in SPEECH and shares[name] < SILENT]
    if not lost:
        return
    yield Finding(
        "features-bad", "prevents" if len(lost) == len(SPEECH) else "warning",
        f"Sound of {', '.join(lost)} does not reach the features: they hardly change where it is taken away.",
        "The mel filters end below it, or begin above it, or the audio is filtered before. Vowels differ from 300 to 2500 "
        "Hz, consonants up to 4000 Hz and above: without it different sounds look the same.",
        {"change of the features, of the largest": {name: round(share, 3) for name, share in shares.items()},
         "lowfreq": subject.settings.get("model.preprocessor.lowfreq") if subject.settings else None,
         "highfreq": subject.settings.get("model.preprocessor.highfreq") if subject.settings else None},
        ["model.preprocessor.lowfreq=0 model.preprocessor.highfreq=null (half of the sampling rate)"], 0.85,
        where="model.preprocessor",
        plots=[Plot("Bands in the features", "Hz", "change / largest",
                    {"measured": ([sum(band) / 2 for band in bands], list(shares.values()))})])


@check("features", faults=("features-bad",), needs=("model",))
def every_sample_is_read(subject):
    """Every stretch of the audio leaves a trace in the features."""
    probe = subject.probe
    rate = probe.sample_rate
    generator = torch.Generator().manual_seed(1)
    noise = 0.1 * torch.randn(int(SECONDS * rate), generator=generator)
    width = max(int(CLICK * rate), 1)
    places = (torch.rand(CLICKS, generator=generator) * 0.8 + 0.1) * len(noise)  # not at the ends, where windows hang over
    unread = 0
    with untouched(probe.model), torch.no_grad():
        still, _ = front_end(probe, [Item(noise.numpy())])
        for place in places.long().tolist():
            clicked = noise.clone()
            clicked[place : place + width] = 0.3
            x, _ = front_end(probe, [Item(clicked.numpy())])
            if x.shape != still.shape:
                raise NotExamined("the front end gives other frames for other audio of the same length")
            unread += bool((x == still).all())
    if unread == CLICKS:
        raise NotExamined("no change of the audio shows in the features")
    if unread <= SKIPPED * CLICKS:
        return
    get = subject.settings.get if subject.settings else lambda key: None
    yield Finding(
        "features-bad", "warning",
        f"Of {CLICKS} clicks of {CLICK * 1000:g} ms {unread} leave no trace in the features: that share of the audio is never "
        "read.",
        "The window is shorter than the hop, and what lies between two windows is skipped: plosives last 5 to 20 ms.",
        {"without a trace": unread, "of": CLICKS, "window_size": get("model.preprocessor.window_size"),
         "window_stride": get("model.preprocessor.window_stride")},
        ["model.preprocessor.window_size=0.025 model.preprocessor.window_stride=0.01"], 0.95, where="model.preprocessor")


def _without(sound: Tensor, rate: int, low: float, high: float) -> Tensor:
    """The sound (samples) with what lies between two frequencies taken out of every other stretch, by soft edges:
    what is there or not all the time, normalisation over an utterance would hide."""
    spectrum = torch.fft.rfft(sound)
    frequency = torch.fft.rfftfreq(len(sound), 1 / rate)
    part = torch.fft.irfft(spectrum * ((frequency >= low) & (frequency < high)), n=len(sound))
    t = torch.arange(len(sound)) / rate
    gone = (0.5 - 4 * torch.cos(2 * math.pi * t / SWITCH)).clamp(0, 1)  # edges of 16 ms
    return sound - gone * part
