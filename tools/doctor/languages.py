"""Texts in another language than the rest, spelt or written backwards (family "pairs"): told by the small words that
every sentence of a language has. Standard library only.

Names, numbers and commands have none of them and count for no language; a language that is not in the list, or one
between two that are, gives no verdict.
"""

from __future__ import annotations

import unicodedata
from collections import Counter

from tools.doctor.finding import Finding
from tools.doctor.registry import NotExamined, check

# Without accents: texts for training have often lost them.
SMALL_WORDS = {name: frozenset(words.split()) for name, words in {
    "English": "the and of to that was with his for it had as be at which this have from were by are she they would "
               "there been their what when will said you is not i a in on do no so we me my him an or if but",
    "German": "und der die das ist nicht ein eine zu den dem mit sich auf fur von es im er sie wir ich war auch als "
              "noch nach bei aus wie dass oder wird sind hat einen einer des kann wenn nur",
    "French": "le la les et est une des du que qui dans pour pas sur au avec il elle ce ne se plus je nous vous mais "
              "sont cette aux etait par ou en un de",
    "Spanish": "el la los las y es una que en por con para del se no su al lo como mas pero sus le ha este esta son "
               "fue muy si o de un",
    "Italian": "il di che e la per non una sono del con della si le nel gli ma piu anche dei alla come questo ha lo "
               "nella era i un in da al",
    "Portuguese": "o a de que e do da em um para nao uma os no na por mais as dos como mas ao ele das seu sua ou ser "
                  "quando muito foi se com pelo",
    "Dutch": "de het een en van ik te dat niet zijn op met voor hij er maar om aan ook dit als was bij naar zo wat in "
             "is worden deze of",
    "Swedish": "och att det som en pa ar av for med den till inte har jag om ett han men var fran vi sa kan nar de "
               "eller fran",
    "Danish": "og det at en den til er som pa de med han af for ikke der var mig sig men et har om vi havde fra kan "
              "eller",
    "Polish": "i w na nie sie z do to ze jest o jak ale po co tak za od jego przez dla lub jesli oraz jako",
}.items()}
LETTERS = 0.8  # share of words that are one letter; in English 5 %
FEWEST = 40  # texts, that tell what the usual language is
MOST = 20_000  # texts of a manifest that are looked at
USUAL = 0.15  # share of all words that are small words of the usual language
WORDS, SHARE = 3, 0.2  # of a text in another language: small words, and their share of its words
PURE = 0.2  # small words of the usual language in it, by those of the other, at most
ROWS, PART = 5, 0.04  # texts in another language that are worth a word: so many, and that share


@check("pairs", needs=("manifests",))
def texts_are_in_one_language(subject):
    """Texts are in one language, as far as its small words tell."""
    judged = False
    for role, rows in subject.rows.items():
        rows = some([row for row in rows if row["text"].strip()])
        if len(rows) < FEWEST or len({row.get("lang") for row in rows}) > 1:  # of several languages, and it is known
            continue
        texts = [Counter(plain_words(row["text"])) for row in rows]
        together = Counter()
        for words in texts:  # a sum of counters would copy all words once a row
            together.update(words)
        usual, share = most_likely(together)
        if share < USUAL:
            continue
        judged = True
        found, between, other = max(
            ((*in_another(texts, usual, other), other) for other in SMALL_WORDS if other != usual),
            key=lambda judged: len(judged[0]))
        # A dialect, or a language between two of the list, has words of both in most of its texts.
        if len(found) >= max(ROWS, PART * len(rows)) and between < 0.5 * len(found):
            yield _another_language(role, rows, found, usual, other)
    if not judged:
        raise NotExamined(f"takes {FEWEST} texts of a language known here ({', '.join(SMALL_WORDS)}), and no `lang` in "
                          "the rows that says there are several")


@check("pairs", needs=("manifests",))
def texts_are_words(subject):
    """Texts are words, with spaces between them, written forwards."""
    judged = False
    for role, rows in subject.rows.items():
        rows = some([row for row in rows if row["text"].strip()])
        words = [word for row in rows for word in plain_words(row["text"])]
        if len(rows) < FEWEST or len(words) < 4 * FEWEST:
            continue
        judged = True
        latin = [word for word in words if word.isascii()]
        letters = sum(len(word) == 1 for word in latin) / len(words)
        forwards, backwards = (most_likely(Counter(word[::turn] for word in words))[1] for turn in (1, -1))
        if letters > LETTERS:
            told = (f"{letters:.0%} of the words of {role} are single letters: texts are spelt.",
                    "A space stands between all letters, as in fairseq's .ltr files: half of all labels are spaces that "
                    "nobody speaks, targets are twice as long, and a word error rate counts letters.",
                    "take the spaces between letters out, and write a space where the file has |")
        elif backwards >= USUAL and forwards < 0.5 * backwards:
            told = (f"The texts of {role} are written backwards: {backwards:.0%} of their words are small words of a language "
                    f"when read from the end, {forwards:.0%} as they stand.",
                    "Letters stand from the last to the first, and audio runs from the first to the last: CTC cannot turn "
                    "them round.", "turn the texts round again: text[::-1]")
        else:
            continue
        symptom, cause, fix = told
        yield Finding(
            "data-mismatched-text", "warning" if letters > LETTERS or role != "train" else "prevents", symptom, cause,
            {"single letters": round(letters, 3), "small words": round(forwards, 3), "read from the end": round(backwards, 3),
             "first": rows[0]["text"][:80]}, [fix], 0.9, where=rows[0]["_at"])
    if not judged:
        raise NotExamined(f"takes {FEWEST} texts of some words")


def some(rows: list[dict]) -> list[dict]:
    """All of few rows; of many every second, third and so on, MOST at most."""
    return rows[:: -(-len(rows) // MOST) or 1]


def plain_words(text: str) -> list[str]:
    """Lower-case words without accents and punctuation."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    return "".join(c if c.isalpha() else " " for c in letters if not unicodedata.combining(c)).split()


def in_another(texts: list[Counter], usual: str, other: str) -> tuple[list[int], int]:
    """(indices of the texts in the other language, number of texts with words of both), by words that only one has."""
    ours, theirs = SMALL_WORDS[usual] - SMALL_WORDS[other], SMALL_WORDS[other] - SMALL_WORDS[usual]
    found, between = [], 0
    for at, words in enumerate(texts):
        own, foreign = (sum(words[word] for word in words.keys() & small) for small in (ours, theirs))
        if foreign >= WORDS and foreign >= SHARE * words.total() and own <= PURE * foreign:
            found.append(at)
        elif foreign >= 2 and own >= 2 and PURE * own < foreign:
            between += 1
    return found, between


def most_likely(words: Counter) -> tuple[str, float]:
    """(the language with the most small words among these, their share)."""
    return max(((name, _share(words, small)) for name, small in SMALL_WORDS.items()), key=lambda pair: pair[1])


def _share(words: Counter, small: frozenset[str]) -> float:
    return sum(words[word] for word in small) / max(words.total(), 1)


def _another_language(role: str, rows: list[dict], found: list[int], usual: str, other: str) -> Finding:
    share = len(found) / len(rows)
    return Finding(
        "data-mismatched-text",
        "warning",
        f"At least {len(found)} of {len(rows)} texts of {role} are {other}, the others {usual}, by the small words "
        "in them.",
        "If what is spoken is of one language, these are translations, or texts of another corpus. A corpus of two "
        "languages is no fault: say so with a field `lang` in its rows.",
        {"texts": len(found), "share": round(share, 3),
         "first": [f"{rows[at]['_at']}: {rows[at]['text'][:80]!r}" for at in found[:5]]},
        [f"listen to {rows[found[0]]['audio_filepath']}: is it {other}? If not, drop these rows or find their texts"],
        0.6,
        where=rows[found[0]]["_at"],
    )
