"""What the options of a data section make of the manifests: NeMo's text cleaning, its choice of channels. No torch."""

from __future__ import annotations

import string
from collections import Counter, defaultdict
from typing import Any, NamedTuple

from manifests.report import Finding as LineFinding
from manifests.schema import show
from tools.doctor.configs import Settings

SECTIONS = {"train": "train_ds", "validation": "validation_ds", "test": "test_ds"}


class Lost(NamedTuple):
    """Characters of a manifest's texts that never become targets."""

    file: str
    utterances: int
    found: list[LineFinding]  # one a text that loses any
    characters: Counter  # character -> how often it is lost
    total: int  # characters of all texts, plain spaces left out

    @property
    def share(self) -> float:
        return self.characters.total() / max(self.total, 1)


def option(settings: Settings | None, role: str, name: str) -> Any:
    """Value of an option of the role's data section where NeMo's loader reads it; that of our recipes does not."""
    if settings is None or settings.recipe:
        return None
    return settings.get(f"model.{SECTIONS.get(role, 'train_ds')}.{name}")


def cleaning(settings: Settings | None, role: str) -> str | None:
    """Name of the parser whose cleaning NeMo's loader puts the texts of a role through; None where it leaves them."""
    if not option(settings, role, "normalize_transcripts") or settings.get("model.tokenizer") is not None:
        return None
    return str(option(settings, role, "parser") or "en")


def cleaned(text: str, parser: str, labels: set[str]) -> str:
    """A text as `normalize_transcripts` leaves it, as far as its characters go.

    `base` makes it lower case; `en` and `ru` write it in ASCII letters too, make spaces of punctuation that is no
    label, and spell out numbers, which are left out here: they become letters.
    """
    if parser == "base":
        return text.strip().lower()
    try:
        from text_unidecode import unidecode
    except ImportError:  # a package that NeMo asks for only here
        unidecode = str
    gone = "".join(char for char in string.punctuation if char not in labels) + string.digits
    return " ".join(unidecode(text).lower().translate(str.maketrans(gone, " " * len(gone))).split())


def lost_in_cleaned(rows: list[dict], parser: str, labels: set[str]) -> list[Lost]:
    """What the cleaned texts of rows (see Subject.rows) lose to the labels, a manifest each that loses any."""
    by_file: dict[str, list[dict]] = defaultdict(list)
    for row in rows:
        by_file[row["_at"].rpartition(":")[0]].append(row)
    losses = []
    for file, members in by_file.items():
        found, lost, total = [], Counter(), 0
        for row in members:
            text = cleaned(row["text"], parser, labels)
            outside = [char for char in text if char not in labels and char != " "]
            lost.update(outside)
            total += len(text) - text.count(" ")
            if outside:
                shown = show("".join(sorted(set(outside))))
                message = (f"{len(outside)} characters outside the labels ({shown}) in {show(text)}, which "
                           f"normalize_transcripts makes of {show(row['text'])}")
                line = int(row["_at"].rpartition(":")[2])
                found.append(LineFinding("error", "outside_labels", file, line, message, shown))
        if found:
            losses.append(Lost(file, len(members), found, lost, total))
    return losses


def makes_mono(settings: Settings | None, role: str, channels: int) -> bool:
    """Whether NeMo's loader makes one channel of this many by the section's `channel_selector`."""
    chosen = option(settings, role, "channel_selector")
    if chosen is None or isinstance(chosen, bool):
        return False
    if not option(settings, role, "use_lhotse"):
        if option(settings, role, "is_tarred"):
            return False  # that loader does not read it
        if chosen == "average":
            return True
        if not isinstance(chosen, (int, str)) and len(chosen) == 1:
            chosen = chosen[0]
    return isinstance(chosen, int) and 0 <= chosen < channels
