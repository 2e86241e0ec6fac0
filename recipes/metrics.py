"""Word and character error rates, corpus-level, by jiwer.

Errors are summed over the corpus and divided once: averaging the WER of batches or utterances is one of the
ways in which a metric lies. Both sides pass through the same normalisation, `manifests.text.normalize`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import jiwer

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
