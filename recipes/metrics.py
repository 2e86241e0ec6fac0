"""Word and character error rates, corpus-level, by jiwer.

Errors are summed over the corpus and divided once: averaging the WER of batches or utterances is one of the
ways in which a metric lies. Both sides pass through the same normalisation, `manifests.text.normalize`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import jiwer
import numpy as np

from manifests.text import normalize


@dataclass(frozen=True)
class ErrorCounts:
    """Edit operations against `reference` tokens; `+` sums corpora."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    reference: int = 0

    def __add__(self, other: ErrorCounts) -> ErrorCounts:
        return ErrorCounts(*(a + b for a, b in zip(asdict(self).values(), asdict(other).values())))

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Errors per reference token, 0 to above 1; an empty reference counts as one token."""
        return self.errors / max(self.reference, 1)


def count_errors(references: list[str], hypotheses: list[str]) -> tuple[ErrorCounts, ErrorCounts]:
    """Word and character errors of normalised texts; an utterance without reference counts as insertions.

    Raises ValueError where the two lists differ in length.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references against {len(hypotheses)} hypotheses")
    references = [normalize(text) for text in references]
    hypotheses = [normalize(text) for text in hypotheses]
    words, characters = ErrorCounts(), ErrorCounts()
    for reference, hypothesis in zip(references, hypotheses):
        if not reference:  # jiwer refuses an empty reference
            words += ErrorCounts(insertions=len(hypothesis.split()))
            characters += ErrorCounts(insertions=len(hypothesis))
    pairs = [(reference, hypothesis) for reference, hypothesis in zip(references, hypotheses) if reference]
    if pairs:
        kept, heard = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        words += _counts(jiwer.process_words(kept, heard))
        characters += _counts(jiwer.process_characters(kept, heard))
    return words, characters


def _counts(measured) -> ErrorCounts:
    reference = measured.substitutions + measured.deletions + measured.hits
    return ErrorCounts(measured.substitutions, measured.deletions, measured.insertions, reference)


def utterance_errors(references: list[str], hypotheses: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Word errors and reference words of each utterance, int64 (N) each; the sums are those of `count_errors`."""
    errors = np.zeros(len(references), dtype=np.int64)
    words = np.zeros(len(references), dtype=np.int64)
    pairs = [(normalize(reference), normalize(hypothesis)) for reference, hypothesis in zip(references, hypotheses)]
    kept = [i for i, (reference, _) in enumerate(pairs) if reference]
    for i, (reference, hypothesis) in enumerate(pairs):
        words[i] = len(reference.split())
        if not reference:
            errors[i] = len(hypothesis.split())
    if kept:
        measured = jiwer.process_words([pairs[i][0] for i in kept], [pairs[i][1] for i in kept])
        for i, chunks in zip(kept, measured.alignments):
            errors[i] = sum(
                max(chunk.ref_end_idx - chunk.ref_start_idx, chunk.hyp_end_idx - chunk.hyp_start_idx)
                for chunk in chunks if chunk.type != "equal"
            )
    return errors, words


def bootstrap_interval(errors: np.ndarray, words: np.ndarray, level: float = 0.95, samples: int = 1000, seed: int = 0):
    """(low, high) of the corpus-level rate when the utterances are drawn again with replacement, or None.

    None where nothing can be drawn: fewer than two utterances or no reference words. Source: Bisani and Ney 2004,
    "Bootstrap estimates for confidence intervals in ASR performance evaluation". Deterministic for a seed.
    """
    count = len(errors)
    if count < 2 or words.sum() == 0:
        return None
    generator = np.random.default_rng(seed)
    rates = np.empty(samples)
    for k in range(samples):  # one draw at a time: a matrix of draws would take gigabytes on a large corpus
        drawn = generator.integers(0, count, count)
        rates[k] = errors[drawn].sum() / max(words[drawn].sum(), 1)
    low, high = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
