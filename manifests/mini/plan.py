"""Who says what and how: the complete plan of the corpus, before any sound is made.

The plan is a function of (seed, scale). An utterance's prosody, level and noise follow from the seed and its id, so
they do not change with the scale or the number of processes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from manifests.mini.text import Sentence, sentences
from manifests.mini.voices import DEV_ONLY, KNOWN, UNSEEN, Voice

CHAPTER = 25  # utterances in a chapter, at most
# Known voices in dev and test: both sexes and all accents, taken at equal steps through the table.
READERS = {
    "train": KNOWN,
    "dev": KNOWN[::2] + DEV_ONLY,
    "test-known": KNOWN,
    "test-unseen-voices": UNSEEN,
    "test-new-words": KNOWN,
}


@dataclass(frozen=True)
class Chapter:
    """One folder ``subset/speaker/chapter``: ``name`` is "<speaker>-<chapter>"; ``jobs`` are synth.py's utterances."""

    subset: str
    voice: Voice
    number: int
    jobs: tuple[dict, ...]

    @property
    def name(self) -> str:
        return f"{self.voice.speaker}-{self.number}"

    @property
    def folder(self) -> str:
        """Relative to the folder that holds the subsets."""
        return f"{self.subset}/{self.voice.speaker}/{self.number}"


def job(sentence: Sentence, voice: Voice, utterance: str, seed: int) -> dict:
    """What synth.py needs for one utterance: words, voice, prosody, level, noise."""
    rng = random.Random(f"mini-{seed}-{utterance}")
    voice_rng = random.Random(f"mini-voice-{voice.speaker}")  # a voice's room and microphone do not change
    slope, level = voice_rng.uniform(-0.25, 0.35), voice_rng.uniform(-27.0, -21.0)
    return {
        "id": utterance,
        "text": sentence.text,
        "spoken": sentence.spoken,
        "voice": voice.espeak,
        "rate": round(voice.rate * rng.uniform(0.94, 1.06)),
        "pitch": max(0, min(99, voice.pitch + round(rng.uniform(-6, 6)))),
        "spread": max(0, min(99, voice.spread + round(rng.uniform(-10, 10)))),
        "lead": round(rng.uniform(0.10, 0.25), 3),
        "tail": round(rng.uniform(0.10, 0.25), 3),
        "slope": round(slope + rng.uniform(-0.08, 0.08), 3),
        "level": round(level + rng.uniform(-2.0, 2.0), 2),
        "snr": round(rng.uniform(25.0, 45.0), 2),
        "seed": rng.getrandbits(31),
    }


def plan(seed: int = 0, scale: float = 1.0) -> list[Chapter]:
    """All chapters, in the order in which they are made.

    Sentence i of a subset is read by its reader i modulo the number of readers, so that a small scale keeps as many
    voices as it has sentences.
    """
    chapters: list[Chapter] = []
    for part, (subset, found) in enumerate(sentences(seed, scale).items()):
        readers = READERS[subset]
        for place, voice in enumerate(readers):
            mine = found[place :: len(readers)]
            for start in range(0, len(mine), CHAPTER):
                number = voice.speaker * 1000 + part * 200 + start // CHAPTER  # the same at any scale
                jobs = tuple(
                    job(sentence, voice, f"{voice.speaker}-{number}-{i:04d}", seed)
                    for i, sentence in enumerate(mine[start : start + CHAPTER])
                )
                chapters.append(Chapter(subset, voice, number, jobs))
    return chapters
