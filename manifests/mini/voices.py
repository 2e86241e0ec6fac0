"""The voices of the embedded corpus: an espeak-ng accent with a variant, and the base rate, pitch and range of each.

Two accents, American and British, and an unhurried rate: the corpus is there to show within minutes that a recipe
converges, so what is hard in it is new sentences, new voices and new words, not dialects. Variants are espeak-ng's
``!v`` files, the robot, whisper and echo effects left out. A variant has its own formants, so two voices of one accent
differ as two people do, not by pitch alone. Speaker ids are numeric, as LibriSpeech has them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Voice:
    """One speaker. ``rate``: words a minute; ``pitch`` and ``spread``: espeak-ng's 0 to 99 scales (50 is neutral)."""

    speaker: int
    sex: str
    name: str
    espeak: str
    rate: int
    pitch: int
    spread: int


def _voices(first: int, table: str) -> list[Voice]:
    rows = [line.split() for line in table.strip().splitlines()]
    return [
        Voice(first + i, sex, name, f"{accent}+{variant}", int(rate), int(pitch), int(spread))
        for i, (name, sex, accent, variant, rate, pitch, spread) in enumerate(rows)
    ]


# name sex accent variant rate pitch spread
KNOWN = _voices(101, """
    Alex      M  en-us           Alex     132  50  50
    Andrea    F  en-us           Andrea   124  48  55
    Frances   F  en-us           f2       128  50  60
    Miles     M  en-us           m3       140  50  50
    Mike      M  en-us           Mike     130  55  45
    Annie     F  en-us           Annie    134  45  50
    Belinda   F  en-us           belinda  128  42  45
    Morris    M  en-us           m7       136  55  60
    Linda     F  en-us           linda    132  45  50
    Quincy    M  en-us           quincy   130  55  55
    Fiona     F  en              f3       134  50  50
    Michael   M  en              Michael  128  50  50
    Martha    F  en              f1       138  45  50
    Denis     M  en              Denis    131  50  55
    Paul      M  en              paul     126  58  60
    Robert    M  en              robert   134  52  50
""")

# Heard in dev only.
DEV_ONLY = _voices(201, """
    Mario     M  en-us           Mario    134  52  50
    Fay       F  en              f5       130  45  55
""")

# Heard in the test part test-unseen-voices only; their accents are in train, their variants are not.
UNSEEN = _voices(301, """
    Andy      M  en-us           Andy     134  50  50
    Aunty     F  en-us           aunty    130  42  50
    Marvin    M  en-us           m4       137  52  50
    Flora     F  en              f4       130  50  50
    Victor    M  en              victor   135  50  55
    Milton    M  en              m6       138  50  50
""")
