"""The voices of the embedded corpus: an espeak-ng accent with a variant, and the base rate, pitch and range of each.

Accents are the English ones of the wheel (American, New York, British, received pronunciation, Scottish, Lancaster);
variants are its ``!v`` files, the robot, whisper and echo effects left out. A variant has its own formants, so two
voices of one accent differ as two people do, not by pitch alone. Speaker ids are numeric, as LibriSpeech has them.
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
    Alex      M  en-us           Alex     158  50  50
    Andrea    F  en-us           Andrea   144  48  55
    Frances   F  en-us           f2       150  50  60
    Miles     M  en-us           m3       168  50  50
    Mike      M  en-us           Mike     155  55  45
    Annie     F  en-us           Annie    160  45  50
    Gene      M  en-us           Gene     172  50  55
    Belinda   F  en-us           belinda  152  42  45
    Morris    M  en-us           m7       162  55  60
    Linda     F  en-us-nyc       linda    158  45  50
    Quincy    M  en-us-nyc       quincy   154  55  55
    Fiona     F  en              f3       160  50  50
    Michael   M  en              Michael  150  50  50
    Martha    F  en              f1       166  45  50
    Denis     M  en              Denis    156  50  55
    Steph     F  en              steph    162  50  50
    Paul      M  en              paul     148  58  60
    Fay       F  en-gb-x-rp      f5       156  45  55
    Robert    M  en-gb-x-rp      robert   160  52  50
    Alicia    F  en-gb-x-rp      Alicia   152  40  45
    Milton    M  en-gb-x-rp      m6       168  50  50
    Max       M  en-gb-scotland  max      154  50  50
    Flora     F  en-gb-scotland  f4       150  50  50
    Antonio   M  en-gb-x-gbclan  antonio  140  50  50
""")

# Heard in dev only.
DEV_ONLY = _voices(201, """
    Mario     M  en-us           Mario    160  52  50
    Anika     F  en-us           anika    136  35  45
    Pedro     M  en              pedro    140  50  55
    Grandma   F  en-gb-x-rp      grandma  150  48  50
""")

# Heard in the test part test-unseen-voices only; their accents are in train, their variants are not.
UNSEEN = _voices(301, """
    Andy      M  en-us           Andy     160  50  50
    Aunty     F  en-us           aunty    156  42  50
    Victor    M  en              victor   164  50  55
    Stella    F  en              steph2   152  55  45
    Ed        M  en-gb-x-rp      ed       158  50  50
    Norbert   M  en-gb-x-gbclan  norbert  154  50  50
    Mildred   F  en-gb-scotland  f2       158  40  55
    Marvin    M  en-us-nyc       m4       166  52  50
""")
