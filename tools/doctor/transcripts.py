"""Transcripts that lie beside the audio (family "pairs"): LibriSpeech's `*.trans.txt`, `NAME.txt`, `NAME.lab`."""

from __future__ import annotations

import os
import re

from tools.doctor.finding import Finding
from tools.doctor.pairs import CAUSE, FIX
from tools.doctor.registry import NotExamined, check

# (how the symptom goes on, cause, changes, whether the words said are the true ones, written otherwise)
WRITTEN = (
    (": they are the same, written backwards",
     "Letters stand from the last to the first, and audio runs from the first to the last: CTC cannot turn them round.",
     ["turn the texts round again: text[::-1]"],
     lambda said, true: "".join(said) == "".join(true)[::-1] and said != true),
    (": they are the same, spelt letter by letter",
     "A space stands between all letters, as in fairseq's .ltr files: half of all labels are spaces that nobody speaks, "
     "and targets are twice as long.",
     ["take the spaces between letters out, and write a space where the file has |"],
     lambda said, true: "".join(said) == "".join(true) and len(said) > 2 * len(true)),
    (": they are the same, without the spaces between words",
     "Words cannot be told apart: what is learned is right by letters, and its word error rate stays near 100 %.",
     ["keep the spaces: one between two words"],
     lambda said, true: "".join(said) == "".join(true) and 2 * len(said) <= len(true)),
)

KEPT = 0.2  # share of the texts whose words are those of their transcript, otherwise: told, though they belong there
# The same, of texts that go with their transcripts: (how it goes on, cause, changes, which, whether it prevents learning)
CHANGED = (
    (": they have the same words, in another order",
     "Words were sorted, shuffled, or put through a set. CTC reads from left to right and cannot put them in order.",
     ["build the manifest from the transcripts as they are; no set() on the way"],
     lambda said, true: said != true and set(said) == set(true) and len(said) > 2, True),
    (": they end before the transcript does",
     "Texts were cut to a length, by a column of a data base or a tokenizer's limit: the model is taught silence for the rest "
     "of what is said.",
     ["keep whole texts, and leave out utterances that are too long (max_duration)"],
     lambda said, true: len(said) <= len(true) and said != true and said[:-1] == true[: len(said) - 1]
     and true[len(said) - 1].startswith(said[-1]), False),
    (": words of the transcript are left out",
     "Stop words, fillers or words that a list does not have were taken out of the texts. They are said: the model is taught "
     "to skip them, most of all the short ones, and is measured by texts that have them.",
     ["build the manifest from the transcripts as they are; no filter of words for search or topics"],
     lambda said, true: len(said) < len(true) and _within(said, true), False),
)


@check("pairs", faults=("data-mismatched-text",), needs=("manifests",))
def transcripts_beside_audio(subject):
    """Texts are those of the transcripts that lie beside the audio."""
    compared = 0
    for role, rows in subject.rows.items():
        known: dict[str, dict[str, str]] = {}
        # A part of a recording has a part of its transcript: nothing to compare.
        truth = [None if "offset" in row else beside(row["audio_filepath"], known) for row in rows]
        pairs = [(i, words_of(row["text"]), true) for i, (row, true) in enumerate(zip(rows, truth)) if true is not None]
        compared += len(pairs)
        wrong = [(i, said, true) for i, said, true in pairs if not alike(said, true)]
        if len(wrong) < KEPT * len(pairs) and (finding := _changed(role, rows, pairs)) is not None:
            yield finding
            continue
        if not wrong or len(wrong) < 2 and len(pairs) > 50:
            continue
        texts = {" ".join(words_of(row["text"])): i for i, row in enumerate(rows)}
        shifts = [texts[" ".join(true)] - i for i, _, true in wrong if " ".join(true) in texts]
        share = len(wrong) / len(pairs)
        shift = max(set(shifts), key=shifts.count) if shifts else 0
        shifted = bool(shifts) and shifts.count(shift) > 0.5 * len(wrong)
        row = rows[wrong[0][0]]
        how, cause, fix = next((told for told in WRITTEN if sum(told[3](said, true) for _, said, true in wrong)
                                > 0.8 * len(wrong)), ("", CAUSE, FIX, None))[:3]
        yield Finding(
            "data-mismatched-text",
            "prevents" if role == "train" and share >= 0.3 else "warning",
            f"{len(wrong)} of {len(pairs)} texts of {role} are not those of the transcripts beside the audio{how}"
            + (f": they stand {abs(shift)} line{'s' * (abs(shift) != 1)} too {'early' if shift < 0 else 'late'}"
               if shifted else "")
            + ".",
            cause,
            {"pairs": len(pairs), "wrong": len(wrong), "share": round(share, 4), "first line": row["_at"],
             "manifest says": row["text"][:100], "transcript says": " ".join(wrong[0][2])[:100],
             **({"lines shifted by": shift} if shifted else {})},
            fix,
            1.0,
            where=row["_at"],
        )
    if not compared:
        raise NotExamined("no transcripts lie beside the audio")


def _changed(role: str, rows: list[dict], pairs: list[tuple[int, list[str], list[str]]]) -> Finding | None:
    """A finding where many texts are their transcripts with words in another order, cut off, or left out."""
    for how, cause, fix, is_so, grave in CHANGED:
        found = [(i, true) for i, said, true in pairs if said and is_so(said, true)]
        if len(found) < KEPT * len(pairs) or len(found) < 5:
            continue
        i, true = found[0]
        return Finding(
            "data-mismatched-text", "prevents" if grave and role == "train" else "warning",
            f"{len(found)} of {len(pairs)} texts of {role} are not as in the transcripts beside the audio{how}.", cause,
            {"pairs": len(pairs), "changed": len(found), "share": round(len(found) / len(pairs), 4),
             "manifest says": rows[i]["text"][:100], "transcript says": " ".join(true)[:100]}, fix, 1.0, where=rows[i]["_at"])
    return None


def _within(said: list[str], true: list[str]) -> bool:
    """Whether a list of words is another with some left out."""
    left = iter(true)
    return all(word in left for word in said)


def beside(audio: str, known: dict[str, dict[str, str]]) -> list[str] | None:
    """Words of the transcript that lies beside an audio file, None where there is none; `known` keeps what was read."""
    folder, name = os.path.split(audio)
    stem = os.path.splitext(name)[0]
    if folder not in known:
        known[folder] = _transcripts(folder)
    text = known[folder].get(stem)
    if text is None and "*" in known[folder]:
        for suffix in (".normalized.txt", ".txt", ".lab"):
            try:
                with open(os.path.join(folder, stem + suffix), encoding="utf-8") as file:
                    text = file.read(4000)
                break
            except (OSError, UnicodeDecodeError):
                continue
    return None if text is None or not words_of(text) else words_of(text)


def _transcripts(folder: str) -> dict[str, str]:
    """Name -> text of the `*.trans.txt` in a folder; "*" where single text files lie there."""
    found: dict[str, str] = {}
    try:
        names = os.listdir(folder)
    except OSError:
        return found
    for name in names:
        if name.endswith(".trans.txt"):
            try:
                with open(os.path.join(folder, name), encoding="utf-8") as file:
                    found.update(line.strip().partition(" ")[::2] for line in file if line.strip())
            except (OSError, UnicodeDecodeError):
                continue
        elif name.endswith((".txt", ".lab")):
            found["*"] = ""
    return found


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower().replace("'", ""))


def alike(said: list[str], true: list[str]) -> bool:
    """Whether two texts are the same but for spelling: at least half of the words, in any order."""
    if said == true:
        return True
    a, b = set(said), set(true)
    common = len(a & b)
    # Numbers spelt out, abbreviations, dropped characters leave most words alone; a text without words (upper case
    # dropped, say) is another fault's.
    return not a or common >= 0.5 * min(len(a), len(b)) and common >= 0.3 * max(len(a), len(b))
