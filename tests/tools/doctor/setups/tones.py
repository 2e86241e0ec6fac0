"""Speech in small: a letter is one tone and then another, words are spelled, a voice has its pitch and its pace.

Half a letter says little, so that time and order count. A model learns it in seconds on a CPU, and what goes wrong
with real speech can go wrong with it: targets that do not fit, texts that do not belong to their audio, padding,
silence. About eleven letters a second.
"""

from __future__ import annotations

import json
import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile

RATE = 16000
LETTERS = "abcdefghijklmnopqrstuvwxyz'"
LABELS = [" ", *LETTERS]
WORDS = (
    "the a of to and in is it you that he was for on are with as his they at be this from i have or by one had not but "
    "what all were when we there can an your which their said if do will each about how up out them then she many some "
    "so these would other into has more two her like him see time could no make than first been its who now people my "
    "made over did down only way find use may water long little very after words called just where most know get "
    "through back much before go good new write our used me man too any day same right look think also around another "
    "came come work three word must because does part even place well such here take why things help put years "
    "different away again off went old number quiz jump box fix don't it's we'll"
).split()


def sentences(count: int, seed: int, words: tuple[int, int] = (2, 7)) -> list[str]:
    """`count` different sentences of `words` words each (from, up to but not with)."""
    generator = np.random.default_rng(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(generator.choice(WORDS, generator.integers(*words)))] = None
    return list(found)


def speak(text: str, seed: int, pace: float = 1.0, rate: int = RATE) -> np.ndarray:
    """Samples (float32, within 1) of a text in a voice that follows from the seed; `pace` 2 is twice as fast."""
    generator = np.random.default_rng(seed)
    pitch = generator.uniform(0.96, 1.04)
    length = generator.uniform(0.075, 0.105) / pace
    parts = [np.zeros(int(0.06 * rate))]
    for letter in text:
        count = int(length * generator.uniform(0.85, 1.15) * rate)
        t = np.arange(count) / rate
        # Each letter swells and fades, so that a doubled one is heard twice.
        swell = np.sin(np.pi * (np.arange(count) + 0.5) / count) ** 0.5
        if letter == " ":
            parts.append(np.zeros(count))
            continue
        place = LETTERS.index(letter) if letter in LETTERS else 0
        tone = np.where(np.arange(count) < count / 2, 300 * 1.45 ** (place // 6), 300 * 1.45 ** (place % 6))
        parts.append(0.3 * swell * np.sin(2 * np.pi * pitch * tone * t))
    parts.append(np.zeros(int(0.06 * rate)))
    audio = np.concatenate(parts)
    return (audio + 0.004 * generator.standard_normal(len(audio))).astype(np.float32)


@lru_cache(maxsize=8)
def _spoken(count: int, seed: int, pace: float, words: tuple[int, int]) -> list[tuple[str, np.ndarray]]:
    texts = sentences(count, seed, words)
    return [(text, speak(text, 1000 * seed + i, pace)) for i, text in enumerate(texts)]


def corpus(folder: Path, count: int = 96, seed: int = 1, pace: float = 1.0, name: str = "train",
           words: tuple[int, int] = (2, 7)) -> list[dict]:
    """Writes `count` utterances as FLAC below `folder/name` and returns their manifest rows."""
    place = Path(folder) / name
    place.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, (text, audio) in enumerate(_spoken(count, seed, pace, words)):
        path = place / f"{name}-{i:04d}.flac"
        soundfile.write(path, audio, RATE)
        rows.append({"audio_filepath": str(path), "duration": round(len(audio) / RATE, 4), "sampling_rate": RATE,
                     "text": text, "utterance": path.stem, "speaker": f"{name}{i % 8}"})
    return rows


def write(path: Path, rows: list[dict]) -> str:
    """Writes a manifest, one JSON object a line, and returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def manifests(folder: Path, train: list[dict] | None = None, **more) -> dict[str, list[str]]:
    """A train and a validation manifest as `examine` takes them; `train` replaces the healthy rows.

    `more` (count, seed, pace, words) goes to the healthy corpus.
    """
    folder = Path(folder)
    rows = corpus(folder, **more) if train is None else train
    dev = corpus(folder, count=16, seed=7, name="dev", pace=more.get("pace", 1.0))
    return {"train": [write(folder / "train.json", rows)], "validation": [write(folder / "dev.json", dev)]}


def rewrite(row: dict, audio: np.ndarray, folder: Path, rate: int = RATE, suffix: str = ".flac", **options) -> dict:
    """The row with other audio, written to `folder`; the old file stays as it was."""
    path = Path(folder) / (Path(row["audio_filepath"]).stem + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, audio, rate, **options)
    return {**row, "audio_filepath": str(path)}


def samples(row: dict) -> np.ndarray:
    return soundfile.read(row["audio_filepath"], dtype="float32")[0]


def real(subset: str = "train-clean-5") -> list[dict] | None:
    """Manifest rows of the real LibriSpeech sample beside the project, lower case; None where it is not there."""
    from manifests.librispeech import build_rows
    from tests.conftest import SHARED

    tree = SHARED / "librispeech" / "sample" / "LibriSpeech"
    return build_rows(tree, subset) if tree.is_dir() else None


def fresh(folder: Path) -> Path:
    """An empty folder of this name."""
    shutil.rmtree(folder, ignore_errors=True)
    Path(folder).mkdir(parents=True)
    return Path(folder)
