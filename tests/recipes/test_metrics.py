"""Error counts against hand-computed ones and against an edit distance written here."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.metrics import ErrorCounts, bootstrap_interval, count_errors, utterance_errors


def distance(reference: list, hypothesis: list) -> int:
    """Levenshtein's, by the textbook table."""
    row = list(range(len(hypothesis) + 1))
    for i, token in enumerate(reference, 1):
        row, before = [i], row
        for j, other in enumerate(hypothesis, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (token != other)))
    return row[-1]


def test_hand_computed_corpus():
    references = ["the cat sat on the mat", "hello world", "a b c d"]
    hypotheses = ["the cat sit on mat", "hello big world", "a b c d"]
    words, characters = count_errors(references, hypotheses)
    assert words == ErrorCounts(substitutions=1, deletions=1, insertions=1, reference=12)
    assert words.errors == 3 and words.rate == pytest.approx(0.25)
    # "sat" to "sit" is one letter, "the " four, "big " four; 22 + 11 + 7 characters with their spaces
    assert characters == ErrorCounts(substitutions=1, deletions=4, insertions=4, reference=40)


def test_rate_is_of_the_corpus_and_not_the_mean_of_utterances():
    words, _ = count_errors(["a", "a b c d e f g h i"], ["x", "a b c d e f g h i"])
    assert words.rate == pytest.approx(0.1)  # the mean of 1.0 and 0.0 would be 0.5


def test_empty_reference_counts_as_insertions_and_empty_hypothesis_as_deletions():
    words, characters = count_errors(["", "two words", ""], ["noise here", "", ""])
    assert words == ErrorCounts(0, 2, 2, 2)
    assert characters == ErrorCounts(0, 9, 10, 9)
    assert words.rate == pytest.approx(2.0)  # over 100 % is possible and said


def test_nothing_at_all_has_no_errors():
    words, characters = count_errors([], [])
    assert words == characters == ErrorCounts() and words.rate == 0.0
    assert count_errors(["", ""], ["", ""])[0].rate == 0.0


def test_both_sides_are_normalised_alike():
    words, characters = count_errors(["It\u2019s  A Test"], [" it's a\ttest "])
    assert words.errors == 0 and characters.errors == 0


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError, match="2 references against 1 hypotheses"):
        count_errors(["a", "b"], ["a"])


def test_counts_add_up():
    assert ErrorCounts(1, 2, 3, 10) + ErrorCounts(4, 0, 1, 5) == ErrorCounts(5, 2, 4, 15)


TEXT = st.lists(st.sampled_from(["a", "ab", "abc", "b", "c'd"]), max_size=8).map(" ".join)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), max_size=6))
def test_errors_are_the_edit_distance(pairs):
    references, hypotheses = [p[0] for p in pairs], [p[1] for p in pairs]
    words, characters = count_errors(references, hypotheses)
    assert words.errors == sum(distance(r.split(), h.split()) for r, h in pairs)
    assert words.reference == sum(len(r.split()) for r in references)
    assert characters.errors == sum(distance(list(r), list(h)) for r, h in pairs)
    assert characters.reference == sum(map(len, references))
    # The operations balance: what the hypothesis has more of is insertions less deletions.
    assert words.insertions - words.deletions == sum(len(h.split()) - len(r.split()) for r, h in pairs)
    errors, counts = utterance_errors(references, hypotheses)
    assert errors.tolist() == [distance(r.split(), h.split()) for r, h in pairs]
    assert counts.tolist() == [len(r.split()) for r in references]


def test_interval_holds_the_rate_is_seeded_and_narrows_with_more_utterances():
    generator = np.random.default_rng(1)
    words = generator.integers(5, 20, 400)
    errors = generator.binomial(words, 0.2)
    low, high = bootstrap_interval(errors, words)
    assert low < errors.sum() / words.sum() < high
    assert bootstrap_interval(errors, words) == (low, high) != bootstrap_interval(errors, words, seed=1)
    few_low, few_high = bootstrap_interval(errors[:40], words[:40])
    assert few_high - few_low > 2 * (high - low)
    # About 1.96 binomial standard deviations on each side.
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(0.16 / words.sum()), rel=0.2)


def test_interval_of_what_cannot_be_drawn_is_none():
    assert bootstrap_interval(np.array([1]), np.array([5])) is None
    assert bootstrap_interval(np.array([1, 2]), np.array([0, 0])) is None
    assert bootstrap_interval(np.array([1, 1, 1]), np.array([4, 4, 4])) == (0.25, 0.25)
