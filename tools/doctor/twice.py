"""Utterances that stand twice in a manifest (family "data"), with the same text or with another."""

from __future__ import annotations

from tools.doctor.audio import READ, same_audio
from tools.doctor.data import EXAMPLES, by_file, examples, lines_of, role_of
from tools.doctor.finding import Finding
from tools.doctor.registry import NotExamined, check
from tools.doctor.transcripts import alike, words_of

WRONG = 0.3  # share of a train manifest's texts that are of other audio, from which on it does not learn


@check("data", faults=("data-duplicates",), needs=("manifests",))
def duplicates(subject):
    """No utterance stands twice in one manifest."""
    named = set()
    for file, utterances, found in by_file(subject, {"duplicate_audio", "duplicate_id"}):
        named.add(file)
        finding = _duplicate(file, utterances, lines_of(found), examples(found), found[0].line)
        _tell_texts(finding, told_apart(_rows_of(subject, file)), utterances, role_of(subject, file) == "train")
        yield finding
    unread = 0
    for role, rows in subject.rows.items():
        pairs, left = same_audio(rows)
        unread += left
        twice = [(a, b) for a, b in pairs if a["_at"].rpartition(":")[0] == b["_at"].rpartition(":")[0]]
        if twice and (file := twice[0][1]["_at"].rpartition(":")[0]) not in named:
            first = [f"{b['audio_filepath']} is a copy of {a['audio_filepath']}" for a, b in twice[:EXAMPLES]]
            yield _duplicate(file, len(rows), len(twice), first, int(twice[0][1]["_at"].rpartition(":")[2]))
    if unread:
        raise NotExamined(f"{unread} pairs of files of one text and duration, once {READ / 2**30:.0f} GiB had been read")


def _duplicate(file: str, utterances: int, count: int, first: list[str], line: int) -> Finding:
    return Finding(
        "data-duplicates",
        "warning",
        f"{count} of {utterances} utterances of {file} are there twice.",
        "An utterance that stands twice weighs double, and in a test set makes the error rate that of a few.",
        {"utterances": count, "of": utterances, "first": first},
        [f"drop the second of each: python -m manifests.validate {file} lists them"],
        1.0,
        where=f"{file}:{line}",
    )


def _rows_of(subject, file: str) -> list[dict]:
    return [row for rows in subject.rows.values() for row in rows if row["_at"].rpartition(":")[0] == file]


def told_apart(rows: list[dict]) -> list[list[dict]]:
    """Rows of one recording (path and offset) whose texts are not the same but for spelling, a list a recording."""
    recordings: dict[tuple, list[dict]] = {}
    for row in rows:
        recordings.setdefault((row["audio_filepath"], row.get("offset") or 0), []).append(row)
    return [same for same in recordings.values()
            if any(not alike(words_of(same[0]["text"]), words_of(row["text"])) for row in same[1:])]


def _tell_texts(finding: Finding, apart: list[list[dict]], utterances: int, train: bool) -> None:
    """Adds to a finding on recordings that stand twice that their texts differ: which is right is not known."""
    if not apart:
        return
    wrong = sum(len({" ".join(words_of(row["text"])) for row in same}) - 1 for same in apart)
    finding.weight = "prevents" if train and wrong >= WRONG * utterances else "warning"
    finding.symptom += f" Of {len(apart)} recordings the texts differ: at least {wrong} texts are not what is spoken."
    finding.cause = ("A recording has one text. Where it has two, rows were joined by a key that is not unique (the "
                     "speaker, say), or texts of two sources were merged.")
    finding.evidence["texts that differ"] = [
        "; ".join(f"line {row['_at'].rpartition(':')[2]}: {row['text'][:60]!r}" for row in same[:3])
        for same in apart[:EXAMPLES]]
    others = [f"where they are the same, {change}" for change in finding.fix]
    finding.fix = ["where the texts of a recording differ keep neither row, or find out by listening which is right; "
                   "join texts and audio by utterance id", *(others if finding.evidence["utterances"] > wrong else [])]
