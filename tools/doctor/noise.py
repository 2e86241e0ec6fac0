"""Audio that is sound and no speech: samples read in the wrong byte order, or decoded as what they are not. No torch.

Lowest and highest of `white` and `spread` (audio.py), in 200 files of LibriSpeech, 80 of mini speech and 40 of tones:
as they are 0.00 to 0.02 and 26 to 93 dB; with white noise at 0 dB 0.17 to 0.38 and 4.4 to 9.8; with their bytes swapped
0.49 to 0.59 and 0.4 to 61; of mu-law and A-law taken for linear, 98 %, 0.03 to 0.51 and 0.3 to 2.5; of compressed bytes
0.53 to 0.59 and 0.4 to 0.7.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tools.doctor.audio import by_role, findings_of, is_noise, measured, read, sampled_audio
from tools.doctor.registry import check

FEW, MOST = 0.1, 0.5  # share of the utterances drawn
READ_AGAIN, AGAIN = 5, 6.0  # files, at most, that are tried in other readings, and the seconds of each
SPEECH_SPREAD, SPEECH_WHITE = 10.0, 0.2  # what a reading that is speech has more and less of


@check("audio", faults=("data-silence",), needs=("manifests",))
def speech(subject):
    """Audio that holds sound holds speech."""
    figures = sampled_audio(subject)
    for role, hit in by_role(figures, is_noise).items():
        if len(hit) < FEW * sum(figure["role"] == role for figure in figures):
            continue
        name, fits, tried = right_reading([figure["row"] for figure in hit[:READ_AGAIN]])
        sure = tried and fits > 0.5 * tried
        for finding in findings_of(
            subject, {role: hit}, figures, "data-silence",
            "hold sound and no speech (no pauses, no syllables, or as white as noise where they are loudest)",
            f"Their samples are read as what they are not: {name}. Read so, they are speech." if sure else
            "The samples were read in the wrong byte order or sample format, or compressed data as if it were samples; "
            "or noise covers the speech. The model is taught words for noise.",
            [READINGS[name][1]] if sure else
            ["listen to the files named; decode the originals again, with the byte order and encoding that they have "
             "(sox or ffmpeg read it from the header; raw files have none)"],
            least=MOST, key="white", confidence=0.97 if sure else 0.85,
        ):
            finding.evidence["spread, dB"] = [round(figure["spread"], 2) for figure in hit[:5]]
            finding.evidence["speech in another reading"] = f"{fits} of {tried}: {name}" if fits else f"none of {tried}"
            yield finding


def right_reading(rows: list[dict]) -> tuple[str, int, int]:
    """(the reading under which most of these files are speech, how many of them are, how many were read)."""
    fits, tried = dict.fromkeys(READINGS, 0), 0
    for row in rows:
        found = read(row)
        if found is None or not np.isfinite(found[0]).all():
            continue
        tried += 1
        heard = found[0][: round(AGAIN * found[1])]
        white = {name: min((_white(samples, found[1]) for samples in reading(heard)), default=1.0)
                 for name, (reading, _) in READINGS.items()}
        best = min(white, key=white.get)  # a reading that is nearly right adds noise
        fits[best] += white[best] < SPEECH_WHITE
    best = max(fits, key=fits.get)
    return best, fits[best], tried


def _white(samples: np.ndarray, rate: int) -> float:
    """How white samples are where they are loudest (audio.whiteness); 1 where they can be no speech at all."""
    if not np.isfinite(samples).all() or np.abs(samples).max(initial=0.0) > 1.01:
        return 1.0
    figure = measured(samples, rate)
    return figure["white"] if figure and figure["spread"] > SPEECH_SPREAD else 1.0


def _words(x: np.ndarray) -> np.ndarray:
    """Samples as the 16-bit integers that they were."""
    return np.clip(np.round(x * 32768), -32768, 32767).astype("<i2")


def _octets(x: np.ndarray) -> Iterator[np.ndarray]:
    """The bytes that samples may have been made of: one a sample (unsigned, signed), or two."""
    eighths = np.round(x * 128)
    if np.abs(eighths - x * 128).max() < 0.01:
        yield np.clip(eighths + 128, 0, 255).astype(np.uint8)
        yield np.clip(eighths, -128, 127).astype(np.int8).view(np.uint8)
    else:
        yield _words(x).view(np.uint8)


def _swapped(x: np.ndarray) -> Iterator[np.ndarray]:
    octets = _words(x).view(np.uint8)
    yield octets.view(">i2") / 32768
    yield octets[1:-1].view("<i2") / 32768  # a header of an odd number of bytes


def _companded(x: np.ndarray, law: str) -> Iterator[np.ndarray]:
    """Samples by ITU-T G.711, mu-law or A-law."""
    for octets in _octets(x):
        code = octets ^ (0xFF if law == "mu" else 0x55)
        step, part = (code >> 4 & 7).astype(np.int64), (code & 15).astype(np.int64)
        if law == "mu":
            size = ((part * 8 + 132) << step) - 132
        else:
            size = np.where(step > 0, (part * 16 + 264) << np.maximum(step - 1, 0), part * 16 + 8)
        negative = code & 0x80 if law == "mu" else ~code & 0x80
        yield np.where(negative, -size, size) / 32768


# What the samples are -> (their samples when read so, one or more ways, and how to do it).
READINGS = {
    "16-bit samples with their two bytes in the other order": (
        _swapped, "read them in the other byte order (sox -B or -L, numpy '>i2' for '<i2'), from the header's end on"),
    "32-bit floats": (lambda x: [_words(x)[: len(x) // 2 * 2].view("<f4")], "read them as 32-bit floats (numpy '<f4')"),
    "unsigned 16-bit samples": (
        lambda x: [(_words(x) ^ -32768) / 32768], "read them as unsigned (sox -e unsigned -b 16)"),
    "16-bit samples, of which each byte was taken for one": (
        lambda x: [octets[: len(x) // 2 * 2].view("<i2") / 32768 for octets in _octets(x) if len(octets) == len(x)],
        "read them as 16-bit samples (numpy '<i2')"),
    "mu-law": (lambda x: _companded(x, "mu"), "decode mu-law: sox -e mu-law -r 8000, ffmpeg -f mulaw -ar 8000"),
    "A-law": (lambda x: _companded(x, "a"), "decode A-law: sox -e a-law -r 8000, ffmpeg -f alaw -ar 8000"),
}
