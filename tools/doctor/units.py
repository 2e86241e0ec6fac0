"""What a loss is counted in, from the train texts: characters or tokens, how many a text has, and the loss of the best
output that does not listen. Imports no torch."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

MOST = 2000  # texts that are looked at
FEWEST = 1000  # units whose frequencies say something


@dataclass
class Units:
    """Units (characters or tokens) of texts: `mean` of a text; `level`, the nats a unit of predicting each by how often
    it occurs: 2.85 in English letters, 2.3 in digits, above 6 in Chinese characters. None where there are too few."""

    mean: float
    level: float | None


def of_characters(texts: list[str], labels: list[str] | None) -> Units | None:
    """Units of the characters; of those that are labels, where labels are given. None without a text."""
    total = sum(map(len, texts))
    if not total:
        return None
    every = Counter("".join(some(texts)))
    kept = Counter({char: count for char, count in every.items() if char in labels}) if labels else every
    spelt = kept.total() > 0.5 * every.total()  # else what is left of a text is told by others
    return Units(total / len(texts), level(kept) if spelt else None)


def of_tokens(texts: list[str], folder: str | None) -> Units | None:
    """Units of the tokens that a sentencepiece model makes of texts. None without texts, and where it is not there."""
    path = Path(folder or "") / "tokenizer.model"
    if not texts or not folder or not path.is_file():
        return None
    import sentencepiece

    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(path)).encode(some(texts))
    except (RuntimeError, OSError):  # the tokenizer family says so
        return None
    counts = Counter(piece for row in pieces for piece in row)
    return Units(counts.total() / len(pieces), level(counts)) if counts else None


def spaces(texts: list[str]) -> float | None:
    """Share of the spaces among the characters of texts; None where there are too few."""
    whole = "".join(some(texts))
    return whole.count(" ") / len(whole) if len(whole) >= FEWEST else None


def some(texts: list[str]) -> list[str]:
    """At most MOST texts, spread over all."""
    return texts[:: -(-len(texts) // MOST) or 1]


def level(counts: Counter) -> float | None:
    """Entropy in nats of how often units occur; None of fewer than FEWEST."""
    total = counts.total()
    return sum(-n / total * math.log(n / total) for n in counts.values()) if total >= FEWEST else None
