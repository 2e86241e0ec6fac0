"""A small report on a corpus tree, computed from its FLAC headers and transcripts alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from statistics import median

import soundfile

from manifests.mini.audio import FRAMES_PER_SECOND, ctc_symbols
from manifests.mini.text import SIZES, TESTS


def read_tree(tree: Path) -> dict[str, list[tuple[str, str, float]]]:
    """``{subset: [(utterance id, lower-case text, seconds), ...]}`` of a LibriSpeech-shaped tree.

    Raises OSError where the tree or an audio file is missing.
    """
    if not tree.is_dir():
        raise FileNotFoundError(f"{tree} is not a folder: make the corpus first")
    out: dict[str, list[tuple[str, str, float]]] = {}
    for subset in [name for name in SIZES if (tree / name).is_dir()]:
        rows = out[subset] = []
        for transcript in sorted((tree / subset).glob("*/*/*.trans.txt")):
            for line in transcript.read_text(encoding="utf-8").splitlines():
                utterance, _, text = line.partition(" ")
                info = soundfile.info(transcript.parent / f"{utterance}.flac")
                rows.append((utterance, text.lower(), info.frames / info.samplerate))
    return out


def report(tree: Path) -> str:
    """A table by subset, then the share of new words in the test parts and of the most frequent train word."""
    rows = read_tree(tree)
    names = ("voices", 7), ("sentences", 10), ("tokens", 8), ("words", 7), ("new tokens", 12), ("hours", 7), ("fill", 6)
    lines = [f"{'subset':20}" + "".join(f"{name:>{width}}" for name, width in names)]
    train = Counter(word for _, text, _ in rows.get("train", []) for word in text.split())
    test_tokens = test_new = 0
    for subset, found in rows.items():
        tokens = [word for _, text, _ in found for word in text.split()]
        new = sum(word not in train for word in tokens)
        if subset in TESTS:
            test_tokens, test_new = test_tokens + len(tokens), test_new + new
        fill = max((ctc_symbols(text) / (FRAMES_PER_SECOND * seconds) for _, text, seconds in found), default=0.0)
        lines.append(
            f"{subset:20}{len({u.split('-')[0] for u, _, _ in found}):>7}{len(found):>10}{len(tokens):>8}"
            f"{len(set(tokens)):>7}{new:>5} ({new / max(1, len(tokens)):4.0%})"
            f"{sum(seconds for _, _, seconds in found) / 3600:>7.2f}{fill:>6.2f}"
        )
    if train:
        word, count = train.most_common(1)[0]
        lines.append(
            f"new words: {test_new / max(1, test_tokens):.1%} of the test tokens; most frequent train word: "
            f"{word!r}, {count / train.total():.1%}; median count of a train word: {median(train.values()):g}"
        )
    lines.append("fill: characters and doubled letters over CTC output frames at 25 a second, the fullest utterance")
    return "\n".join(lines)
