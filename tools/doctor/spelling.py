"""Labels of several characters (phonemes, digraphs), and characters that may be left out of texts. Standard library only.

NeMo's parser goes word by word: a word that is a label is one, of any other each character is looked up.
"""

from __future__ import annotations

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable

from manifests.report import Finding as LineFinding
from manifests.schema import show
from tools.doctor.loading import Lost

OF_YAML = {"True", "False", "None"}  # what YAML makes of a bare y, n or ~


def long_labels(labels: Iterable[str] | None) -> set[str]:
    """Labels of several characters."""
    return {label for label in labels or () if len(label) > 1 and label not in OF_YAML}


def without_labels(text: str, long: set[str]) -> str:
    """A text without its words that are labels of their own."""
    return " ".join("" if word in long else word for word in text.split(" ")) if long else text


def lost_in_rows(rows: list[dict], labels: set[str], code: str) -> list[Lost]:
    """What the texts of rows lose to the labels, a manifest each that loses any; code as in data.unspelt."""
    by_file: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        by_file[row["_at"].rpartition(":")[0]].append(row)
    losses = []
    for file, members in by_file.items():
        found, lost, total = [], Counter(), 0
        for row in members:
            outside = Counter(char for char in row["text"] if char != " " and char not in labels
                              and (char.lower() in labels) == (code == "upper_case"))
            lost.update(outside)
            total += len(row["text"]) - row["text"].count(" ")
            if outside:
                shown = show("".join(sorted(outside)))
                message = f"{outside.total()} characters outside the labels ({shown}) in {show(row['text'].strip())}"
                found.append(LineFinding("error", code, file, int(row["_at"].rpartition(":")[2]), message, shown))
        if found:
            losses.append(Lost(file, len(members), found, lost, total))
    return losses


def vowel_marks(characters: Counter) -> int:
    """How many of some characters are points and vowel signs of Arabic or Hebrew, which most writing leaves out."""
    return sum(count for char, count in characters.items() if unicodedata.category(char) == "Mn"
               and unicodedata.name(char, "").startswith(("ARABIC", "HEBREW")))
