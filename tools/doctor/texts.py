"""Texts that have lost something on their way into the manifest (family "pairs"): their end, their spaces, their order, their
small words. Told from the texts alone; where transcripts lie beside the audio, transcripts.py knows. Standard library only.
"""

from __future__ import annotations

import re
from collections import Counter

from tools.doctor.finding import Finding
from tools.doctor.languages import FEWEST, PART, ROWS, USUAL, most_likely, plain_words, some
from tools.doctor.registry import NotExamined, check

CUT, STEEP = 0.03, 8  # share of texts of exactly the largest length, and times as many as of lengths just below
LETTERS = 25  # without a space: longer than words are
SPACED = 0.3  # share of the other texts that must have spaces
LONG, ONCE = 30, 0.9  # words of a text, of which in every language some stand twice; share of such texts in which none does
MARKED = 0.01  # share of texts with marks that nobody speaks, from which on it is said
MARKS = {  # what a text holds that is no speech -> how it is told
    "marks of noises or of what was not understood": re.compile(
        r"\[[^\[\]]{1,30}\]|<(?:unk|noise|sil|spn|spoken_noise|s)>", re.I),
    "tags or entities of HTML": re.compile(
        r"</?(?:i|b|u|p|br|em|font|span|div|strong)\b[^<>]{0,80}>|&(?:amp|quot|lt|gt|nbsp|#\d+);", re.I),
    "letters of UTF-8 that was read as another encoding": re.compile(
        "[\u00c2\u00c3\u00e2\u00e3][\u0080-\u009f\u00a1-\u00aa\u00ac-\u00ba\u00bc-\u00bf]|\u00e2\u20ac|\ufffd"),
    "| for spaces": re.compile(r"(?<=\S)\|(?=\S)"),
}
LACKING = 0.3  # share of small words in train, by that in validation, under which they were taken out


@check("pairs", faults=("data-mismatched-text",), needs=("manifests",))
def texts_are_whole(subject):
    """Texts are whole: with their ends, spaces and small words, in the order in which they are said."""
    judged = False
    for role, rows in subject.rows.items():
        rows = some([row for row in rows if row["text"].strip()])
        if len(rows) < FEWEST:
            continue
        judged = True
        yield from filter(None, (_cut(role, rows), _unspaced(role, rows), _once(role, rows)))
    if not judged:
        raise NotExamined(f"takes {FEWEST} texts")
    train, other = (small_words([row["text"] for row in some(subject.rows.get(role, []))]) for role in ("train", "validation"))
    if train is not None and other is not None and other[1] >= USUAL and train[1] < LACKING * other[1]:
        yield _lacking(subject.rows["train"], train[1], *other)


@check("pairs", faults=("data-mismatched-text",), needs=("manifests",))
def texts_hold_what_is_spoken(subject):
    """Texts hold words, no marks of a transcriber, tags or broken letters."""
    if subject.labels is not None:
        return  # of characters, those that are no labels are told in data.py
    for role, rows in subject.rows.items():
        texts = some(rows)
        for what, pattern in MARKS.items():
            found = [row for row in texts if pattern.search(row["text"])]
            if len(found) >= max(ROWS, MARKED * len(texts)):
                yield _marked(role, what, pattern, found, len(texts))


def _marked(role: str, what: str, pattern: re.Pattern, found: list[dict], of: int) -> Finding:
    seen = Counter(mark.lower() for row in found for mark in pattern.findall(row["text"]))
    return Finding(
        "data-mismatched-text", "warning",
        f"{len(found)} of {of} texts of {role} hold {what}: {', '.join(repr(mark) for mark, _ in seen.most_common(5))}.",
        "A tokenizer of pieces spells whatever it is given: the model is taught to print what nobody says, and an error rate "
        "counts it.",
        {"texts": len(found), "of": of, "most frequent": dict(seen.most_common(10)),
         "first": [f"{row['_at']}: {row['text'][:60]!r}" for row in found[:3]]},
        ["take them out of the texts (or decode these as UTF-8), then train the tokenizer again; a mark that is to be learned "
         "belongs into it as one symbol"], 0.7, where=found[0]["_at"])


def small_words(texts: list[str]) -> tuple[str, float] | None:
    """(the likeliest language, share of its small words) of at least some hundred words; None of fewer."""
    words = Counter(word for text in texts for word in plain_words(text))
    return most_likely(words) if words.total() >= 8 * FEWEST else None


def _cut(role: str, rows: list[dict]) -> Finding | None:
    for unit, size in (("characters", len), ("bytes of UTF-8", lambda text: len(text.encode())),
                       ("words", lambda text: len(text.split()))):
        sizes = Counter(size(row["text"]) for row in rows)
        most = max(sizes)
        below = [sizes[n] for n in range(int(0.9 * most), most)]
        if most < 12 or not below or sizes[most] < max(2 * ROWS, CUT * len(rows), STEEP * (sum(below) / len(below) + 1)):
            continue
        found = [row for row in rows if size(row["text"]) == most]
        return Finding(
            "data-mismatched-text", "prevents" if role == "train" and len(found) > 0.5 * len(rows) else "warning",
            f"{len(found)} of {len(rows)} texts of {role} have exactly {most} {unit}, and none has more.",
            "Texts were cut to a length, by a column of a data base, a tokenizer's limit or a preview: audio goes on where its "
            "text ends, and the model is taught silence for speech.",
            {"length": most, "texts of it": len(found), "of": len(rows), "texts a length just below": round(sum(below) / len(below), 1),
             "ends": [row["text"][-25:] for row in found[:3]]},
            ["keep whole texts, and leave out utterances that are too long (max_duration)"], 0.9, where=found[0]["_at"])
    return None


def _unspaced(role: str, rows: list[dict]) -> Finding | None:
    latin = [row for row in rows if len(row["text"]) >= LETTERS and row["text"].isascii()]
    found = [row for row in latin if len(row["text"].split()) == 1 and any(c.isalpha() for c in row["text"])]
    if len(found) < max(ROWS, PART * len(rows)) or len(latin) - len(found) < SPACED * len(latin):
        return None
    return Finding(
        "data-mismatched-text", "warning",
        f"{len(found)} of {len(rows)} texts of {role} have {LETTERS} letters and more and no space, the others have spaces.",
        "The spaces of a part were lost (a text passed through str.replace or join). The model is taught two ways of writing "
        "the same, and never knows whether a space is wanted.",
        {"texts": len(found), "of": len(rows), "first": [f"{row['_at']}: {row['text'][:60]!r}" for row in found[:3]]},
        ["build these rows again, with one space between two words"], 0.9, where=found[0]["_at"])


def _once(role: str, rows: list[dict]) -> Finding | None:
    texts = [(row, row["text"].split()) for row in rows]
    long = [(row, words) for row, words in texts if len(words) >= LONG]
    once = [(row, words) for row, words in long if len(set(words)) == len(words)]
    if len(long) < FEWEST or len(once) < ONCE * len(long):
        return None
    order = sum(words == sorted(words) for _, words in once) > 0.5 * len(once)
    return Finding(
        "data-mismatched-text", "prevents" if role == "train" else "warning",
        f"In {len(once)} of the {len(long)} texts of {role} with {LONG} words and more no word stands twice"
        + (", and all stand by the alphabet." if order else "."),
        "A text of that length says \"the\" or \"and\" more than once, in any language: the words went through a set, which "
        "keeps neither their number nor their order, and CTC can put nothing in order.",
        {"texts": len(once), "of": len(long), "first": once[0][1][:12]},
        ["build the texts from the transcripts as they are: \" \".join(text.split()), no set() on the way"], 0.85,
        where=once[0][0]["_at"])


def _lacking(rows: list[dict], share: float, language: str, usual: float) -> Finding:
    return Finding(
        "data-mismatched-text", "warning",
        f"Of the words of train {share:.0%} are small words of {language} (the most frequent of a language), of those of "
        f"validation {usual:.0%}.",
        "Stop words were taken out of the texts of train, or they are of other things than sentences (names, commands, lists of "
        "words). They are said in sentences: the model is taught to skip them.",
        {"share in train": round(share, 4), "in validation": round(usual, 4), "language": language},
        ["build the manifest from the transcripts as they are; no filter of words for search or topics"], 0.8,
        where=rows[0]["_at"])
