"""What the lines of manifests say: broken lines, missing audio, characters, empty text, durations, rates, duplicates.

Reads by `manifests.validate`, header of every audio file included. No torch.
"""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from manifests.report import Finding as LineFinding
from manifests.report import Report as Validation
from manifests.report import name_character
from manifests.validate import validate
from tools.doctor.audio import far_off, in_foreign_tar, same_audio
from tools.doctor.finding import Finding
from tools.doctor.headers import Headers
from tools.doctor.loading import SECTIONS, Lost, cleaning, lost_in_cleaned, makes_mono, option
from tools.doctor.registry import NotExamined, check
from tools.doctor.sampling import configured_rates, pace_of_speech
from tools.doctor.spelling import long_labels, lost_in_rows, vowel_marks, without_labels
from tools.doctor.subject import Subject

MANY = 0.2  # share of a manifest's utterances, or characters, from which on a fault keeps a model from learning
EXAMPLES = 5

BROKEN_LINES = {
    "unreadable", "empty_manifest", "bom", "not_utf8", "not_json", "not_object", "blank_line", "missing_field",
    "wrong_type", "bad_string", "bad_path", "bad_offset", "bad_sampling_rate",
}
OF_AUDIO = {"missing_audio", "broken_audio", "not_mono", "rate_mismatch", "duration_mismatch"}


def validation(subject: Subject) -> Validation:
    """The validator's report over all manifests of the subject, made once."""
    if not hasattr(subject, "_validation"):
        train = subject.manifests.get("train", [])
        known = {os.path.normpath(path) for path in train}
        # The same file for training and testing is a leak of its own (leakage); the validator takes each file once.
        held_out = [p for role in ("validation", "test") for p in subject.manifests.get(role, [])
                    if os.path.normpath(p) not in known]
        subject._headers = Headers(subject, [*train, *held_out])
        # Labels of several characters are looked for in spelling.py: the validator goes character by character.
        labels = None if long_labels(subject.labels) else subject.labels
        subject._validation = validate(
            labels=labels, audio=subject._headers, train=train, test=held_out, sampling_rate=subject.sample_rate,
            frames_per_second=0, scan=subject.scan,
        )
    return subject._validation


def by_file(subject: Subject, codes: Iterable[str]) -> Iterator[tuple[str, int, list[LineFinding]]]:
    """(manifest, its utterances, its findings of these codes) for each manifest that has any; of faults of the audio,
    the utterances whose audio was looked at.

    Raises NotExamined where no manifest has a line that could have one, but for those of broken lines themselves.
    """
    codes = set(codes)
    if not codes & BROKEN_LINES and not any(file.lines for file in validation(subject).files):
        raise NotExamined("no line of the manifests can be used")
    found: dict[str, list[LineFinding]] = defaultdict(list)
    for finding in validation(subject).findings:
        if finding.code in codes:
            found[finding.file].append(finding)
    sizes = {file.path: file.lines for file in validation(subject).files}
    if codes & OF_AUDIO:
        sizes = {path: lines - subject._headers.passed[path] for path, lines in sizes.items()}
    for file, findings in found.items():
        yield file, max(sizes.get(file, 0), lines_of(findings), 1), findings


def role_of(subject: Subject, file: str) -> str:
    for role, paths in subject.manifests.items():
        if file in (os.path.normpath(path) for path in paths):
            return role
    return "train"


def grade(subject: Subject, file: str, lines: int, utterances: int) -> str:
    """ "prevents" where many of the training lines are hit, else "warning"."""
    return "prevents" if role_of(subject, file) == "train" and lines >= MANY * utterances else "warning"


def stops_at_text(subject: Subject, file: str) -> bool:
    """Our own recipes stop at the first training text that the labels cannot spell."""
    return bool(subject.settings and subject.settings.recipe) and role_of(subject, file) == "train"


def examples(findings: list[LineFinding]) -> list[str]:
    return [f"line {finding.line}: {finding.message}"[:200] for finding in findings[:EXAMPLES]]


def lines_of(findings: Iterable[LineFinding]) -> int:
    return len({finding.line for finding in findings})


def harmless(subject: Subject, file: str, finding: LineFinding) -> bool:
    """Whether a value is wrong only by the schema: in a field that NeMo never reads, or null where it may be absent."""
    if finding.code not in ("wrong_type", "bad_string") or subject.settings and subject.settings.recipe:
        return False  # our recipes read manifests by the schema
    field = finding.message.partition(" ")[0]
    if field == "sampling_rate" and option(subject.settings, role_of(subject, file), "use_lhotse"):
        return not finding.value.startswith("'")  # a number with a point will do
    return finding.value == "None" if field == "offset" else field not in ("audio_filepath", "duration", "text")


@check("data", faults=("data-manifest-broken",), needs=("manifests",))
def manifest_lines(subject):
    """Every manifest line can be read."""
    lhotse = bool(subject.settings and subject.settings.get("model.train_ds.use_lhotse"))
    for file, utterances, found in by_file(subject, BROKEN_LINES):
        # A text that is not there at all is an empty target, told by empty_texts.
        found = [f for f in found if not (f.code == "missing_field" and "no 'text' field" in f.message)
                 and not harmless(subject, file, f)]
        if not found:
            continue
        blank = all(finding.code == "blank_line" for finding in found) and not lhotse
        # NeMo reads the manifest of validation before the first step, and dies of it as of that of train.
        stops = role_of(subject, file) != "test" or lines_of(found) > 0.5 * utterances
        yield Finding(
            "data-manifest-broken",
            "prevents" if stops and not blank else "warning",
            f"{file}: {found[0].message}." if found[0].code in ("empty_manifest", "unreadable") else
            f"{lines_of(found)} line{'s' * (lines_of(found) != 1)} of {file} cannot be used: {found[0].message}.",
            "NeMo's loaders raise an error far from the cause, or misread such a line without a word."
            + (" Our recipes refuse it." if subject.settings and subject.settings.recipe else ""),
            {"lines": lines_of(found), "of": utterances, "kinds": dict(Counter(f.code for f in found)),
             "first": examples(found)},
            [f"python -m manifests.validate {file} lists every one; mend or drop them"],
            1.0,
            where=f"{file}:{found[0].line}",
            unreadable=all(finding.code == "unreadable" for finding in found),
        )


@check("data", faults=("data-missing-audio",), needs=("manifests",))
def audio_is_there(subject):
    """Every audio file is there and whole."""
    inside = {row["_at"] for rows in subject.rows.values() for row in rows if in_foreign_tar(row)}
    for file, utterances, found in by_file(subject, {"missing_audio", "broken_audio"}):
        found = [finding for finding in found if f"{file}:{finding.line}" not in inside]
        count = lines_of(found)
        if not count:
            continue
        missing = sum(finding.code == "missing_audio" for finding in found)
        yield Finding(
            "data-missing-audio",
            "prevents" if role_of(subject, file) == "train" else "warning",
            f"{count} of {utterances} utterances of {file} have no audio: {missing} files are not there, "
            f"{count - missing} cannot be read or are cut off.",
            "NeMo's own loader stops at the first; its lhotse loader drops them with a warning, and a batch left empty "
            "dies as `max() arg is an empty sequence`.",
            {"missing": missing, "unreadable": count - missing, "first": examples(found)},
            ["mend the paths or build the manifest again: python -m manifests.corpus build NAME --data DIR --out OUT",
             f"or drop those lines: python -m manifests.validate {file} --audio lists them"],
            1.0,
            where=f"{file}:{found[0].line}",
        )
    passed = [f"the audio of {len(inside)} rows is in tar files, and they do not say where (no tar_offset)"] * bool(inside)
    passed += [subject._headers.said] * bool(subject._headers.said)
    if passed:
        raise NotExamined("; ".join(passed))


def unspelt(subject: Subject, code: str) -> Iterator[Lost]:
    """Characters that the labels lack, by manifest: whose lower case is a label (`upper_case`), or the others."""
    labels, sizes = set(subject.labels or ()), {file.path: file for file in validation(subject).files}
    for file, utterances, found in by_file(subject, {code}):
        if cleaning(subject.settings, role_of(subject, file)) is not None:
            continue  # judged as it is cleaned
        counts = sizes[file].characters
        lost = Counter({char: count for char, count in counts.items()
                        if char not in labels and (char.lower() in labels) == (code == "upper_case")})
        yield Lost(file, utterances, found, lost, counts.total() - counts[" "])
    long = long_labels(subject.labels)
    for role, rows in subject.rows.items():
        parser = cleaning(subject.settings, role)
        rows = [{**row, "text": without_labels(row["text"], long)} for row in rows] if long else rows
        if parser is not None and code == "outside_labels":
            yield from lost_in_cleaned(rows, parser, labels)
        elif parser is None and long:
            yield from lost_in_rows(rows, labels, code)


def of_text(subject: Subject, fault: str, lost: Lost, symptom: str, cause: str, fix: list[str], **evidence) -> Finding:
    """A finding on lost characters, by how many: a few do little harm. Which labels there are may be a guess."""
    count, assumed, marks = lines_of(lost.found), subject.labels_assumed, vowel_marks(lost.characters)
    share = lost.share * (1 - marks / max(lost.characters.total(), 1))
    weight = "prevents" if role_of(subject, lost.file) == "train" and share >= MANY else "warning"
    if marks:
        cause += " Vowel signs of Arabic and Hebrew are often left out on purpose: such texts are learned without them."
    if stops_at_text(subject, lost.file):
        weight = "prevents"
    return Finding(
        fault,
        "warning" if assumed else weight,
        f"{count} of {lost.utterances} texts of {lost.file} {symptom} ({share:.1%} of all characters but "
        f"spaces): {lost.found[0].message}."
        + (" There is no configuration: the labels are assumed to be space, a-z and '." if assumed else ""),
        cause,
        {"utterances": count, "of": lost.utterances, "share of characters": round(share, 4), **evidence,
         "first": examples(lost.found)},
        ["name the configuration too (--config, --config-name): its labels or its tokenizer decide"] * assumed + fix,
        0.6 if assumed else 1.0,
        where=f"{lost.file}:{lost.found[0].line}",
    )


@check("data", faults=("data-upper-case",), needs=("manifests",))
def case_of_text(subject):
    """Text and labels have the same case."""
    for lost in unspelt(subject, "upper_case"):
        settings, clean = subject.settings, f"model.{SECTIONS[role_of(subject, lost.file)]}.normalize_transcripts"
        nemo = settings is None or not settings.recipe
        yield of_text(
            subject, "data-upper-case", lost, "have capitals, the labels are lower case",
            "NeMo drops every character that is not among the labels without a word: of an upper-case text only the "
            "spaces are left as targets, and the model learns those. Our recipes stop at such a text.",
            ["lower-case the texts: manifests.text.normalize does it"]
            + [f"+{settings.key(clean) if settings else clean}=true (NeMo's own text cleaning, off by default)"] * nemo,
        )


@check("data", faults=("data-characters", "data-upper-case"), needs=("manifests",))
def characters_of_text(subject):
    """Texts hold only what the labels can spell."""
    if subject.labels is None:
        raise NotExamined("no character labels are known (sub-word tokens, or no configuration)")
    labels = set(subject.labels)
    for lost in unspelt(subject, "outside_labels"):
        capital_labels = sum(count for char, count in lost.characters.items() if char.upper() in labels)
        if capital_labels > 0.5 * lost.characters.total():
            yield _capital_labels(subject, lost)
            continue
        kinds = {name_character(char): count for char, count in lost.characters.most_common()}
        control = any(not char.isprintable() for char in lost.characters)
        yield of_text(
            subject, "data-characters", lost,
            f"hold characters that are not among the labels{' (control characters too)' if control else ''}: "
            f"{', '.join(list(kinds)[:12])}",
            "Our recipes stop at such a text; NeMo drops the characters without a word, so that targets lack what is "
            "spoken.",
            ["remove punctuation (manifests.own_data.strip_punctuation does, and leaves apostrophes), spell numbers out, or drop "
             "those lines",
             "or add the characters to model.labels, if they are part of the language"],
            characters=kinds,
        )


def _capital_labels(subject, lost: Lost) -> Finding:
    parser = cleaning(subject.settings, role_of(subject, lost.file))
    return of_text(
        subject, "data-upper-case", lost,
        "are lower case" + (" once normalize_transcripts has cleaned them" if parser else "")
        + ", the labels are capitals",
        "NeMo drops every character that is not among the labels without a word: of such a text only the spaces are "
        "left as targets, and the model learns those.",
        ["model.labels and model.decoder.vocabulary in the case of the texts"
         + (", which normalize_transcripts makes lower case" if parser else "")],
    )


@check("data", faults=("data-empty-text",), needs=("manifests",))
def empty_texts(subject):
    """No text is empty."""
    for file, utterances, found in by_file(subject, {"empty_text", "missing_field"}):
        found = [f for f in found if f.code == "empty_text" or "no 'text' field" in f.message]
        count = lines_of(found)
        if not count:
            continue
        absent = sum(finding.code == "missing_field" for finding in found)
        yield Finding(
            "data-empty-text",
            grade(subject, file, count, utterances),
            f"{count} of {utterances} utterances of {file} have no text ({absent} have no `text` field at all).",
            "To NeMo that is an empty target: the model is taught that this speech is silence.",
            {"utterances": count, "of": utterances, "first": examples(found)},
            ["give the words or drop those lines", f"python -m manifests.validate {file} lists them"],
            1.0,
            where=f"{file}:{found[0].line}",
        )


@check("data", faults=("data-duration-wrong",), needs=("manifests",))
def durations(subject):
    """Durations are those of the audio."""
    rows = {row["_at"]: row for rows in subject.rows.values() for row in rows}
    for file, utterances, found in by_file(subject, {"duration_mismatch", "bad_duration"}):
        count = lines_of(found)
        off = {finding.line: _off(finding, rows.get(f"{file}:{finding.line}")) for finding in found}
        far = sum(far_off(*pair) for pair in off.values())
        most = max(abs(seconds) for seconds, _ in off.values())
        found.sort(key=lambda finding: -abs(off[finding.line][0]))
        yield Finding(
            "data-duration-wrong",
            grade(subject, file, far, utterances),
            f"{count} of {utterances} durations of {file} are not those of the audio"
            + (f", {far} of them are far off: " if far else f", by at most {most:.2f} s: ") + f"{found[0].message}.",
            "Loaders read as many seconds as the manifest says: too short a duration cuts the end of the speech off "
            "while its text stays, too long a one breaks batches by duration and the filters." if far else
            "They were rounded, or are of another copy of the files. Loaders read as many seconds as the manifest "
            "says: where it says too few, that much of the end is cut off, which is little here.",
            {"utterances": count, "of": utterances, "far off": far, "seconds off, at most": round(most, 3),
             "first": examples(found)},
            [*_offsets(file, off, rows),
             "take durations from the audio's headers: build the manifest again (python -m manifests.corpus build, or "
             "python -m manifests.own_data)"],
            1.0,
            where=f"{file}:{found[0].line}",
        )


def _offsets(file: str, off: dict[int, tuple[float, float]], rows: dict[str, dict]) -> list[str]:
    """The change where rows are stretches of long recordings, and where these begin is not said, or not in seconds.

    `off`: line of the file -> what `_off` says of it; `rows`: "file:line" -> row, of all manifests.
    """
    uses = Counter(row["audio_filepath"] for at, row in rows.items() if at.rpartition(":")[0] == file)
    wrong = [(rows[at], gap) for line, gap in off.items() if (at := f"{file}:{line}") in rows]
    unsaid = sum(seconds < 0 and uses[row["audio_filepath"]] > 1 and "offset" not in row for row, (seconds, _) in wrong)
    beyond = sum(left <= 0 and row.get("offset", 0) > 0 for row, (_, left) in wrong)
    if unsaid > len(wrong) / 2:
        return ["several rows name one recording: give each its \"offset\", the second at which it begins; without it "
                "all are read from the recording's start"]
    late = "\"offset\" is in seconds: these begin behind the end of their recordings"
    return [late] if beyond > len(wrong) / 2 else []


def _off(finding: LineFinding, row: dict | None) -> tuple[float, float]:
    """(seconds between a row's end and its audio's, seconds of its audio); infinity for a duration that is none."""
    if finding.code == "bad_duration" or row is None:
        return math.inf, 0.0
    start, length = row.get("offset", 0.0), float(finding.value)
    return row["duration"] + start - length, length - start


@check("data", faults=("data-sample-rate",), needs=("manifests",))
def sampling_rates(subject):
    """Audio, manifest and model agree on the sampling rate."""
    yield from configured_rates(subject)
    if not long_labels(subject.labels):  # whose characters are no letters
        yield from pace_of_speech(subject)
    for file, utterances, found in by_file(subject, {"rate_mismatch", "other_rate"}):
        lies = [finding for finding in found if finding.code == "rate_mismatch"]
        count = lines_of(found)
        yield Finding(
            "data-sample-rate",
            grade(subject, file, lines_of(lies), utterances) if lies else "warning",
            f"{count} of {utterances} utterances of {file} are not at {subject.sample_rate} Hz: {found[0].message}.",
            "A rate that the manifest states wrongly makes speech too fast or slow, or is refused late; audio at "
            "another rate is resampled while training, which takes time and, from below, brings no high frequencies.",
            {"utterances": count, "of": utterances, "stated wrongly": lines_of(lies),
             "rates": dict(Counter(f.value for f in found)), "first": examples(found)},
            [f"resample the audio to {subject.sample_rate} Hz and build the manifest again"],
            1.0 if lies else 0.8,
            where=f"{file}:{found[0].line}",
        )


@check("data", faults=("data-channels",), needs=("manifests",))
def channels(subject):
    """Every file has one channel."""
    for file, utterances, found in by_file(subject, {"not_mono"}):
        role = role_of(subject, file)
        found = [finding for finding in found if not makes_mono(subject.settings, role, int(finding.value))]
        count = lines_of(found)
        if not count:
            continue
        yield Finding(
            "data-channels",
            "prevents" if role == "train" else "warning",
            f"{count} of {utterances} utterances of {file} have more than one channel: {found[0].message}.",
            "NeMo's own loader dies of them with a TypeError, its lhotse loader makes a batch with one axis too many.",
            {"utterances": count, "of": utterances, "first": examples(found)},
            ["mix down to one channel: sox IN OUT remix - , or keep the channel that has the speech"],
            1.0,
            where=f"{file}:{found[0].line}",
        )


@check("data", faults=("data-leakage",), needs=("manifests",))
def leakage(subject):
    """Nothing of train is in the validation or test sets."""
    train = {os.path.normpath(path) for path in subject.manifests.get("train", [])}
    held_out = [(role, path) for role in ("validation", "test") for path in subject.manifests.get(role, [])]
    if not train or not held_out:
        raise NotExamined("takes a manifest for train and one for validation or test")
    for role, path in held_out:
        if os.path.normpath(path) in train:
            yield _leak(path, 1.0, f"{path} is the manifest of train and of {role}.", {}, 1.0)
    shared = {}
    for file, utterances, found in by_file(subject, {"shared_audio", "shared_id"}):
        # Validation and test may share theirs, many test on both: an error is what a held-out file shares with train.
        if leaked := [finding for finding in found if finding.severity == "error"]:
            shared[file] = utterances, leaked
    for file, (utterances, found) in shared.items():
        share = lines_of(found) / utterances
        symptom = f"{lines_of(found)} of {utterances} utterances of {file} are in train too."
        evidence = {"utterances": lines_of(found), "of": utterances, "first": examples(found)}
        yield _leak(file, share, symptom, evidence, 1.0)
    for role in ("validation", "test"):
        rows = subject.rows.get(role, [])
        pairs = same_audio(subject.rows.get("train", []), rows)[0] if rows else []
        file = pairs[0][1]["_at"].rpartition(":")[0] if pairs else ""
        if pairs and os.path.normpath(file) not in shared:
            first = [f"{b['audio_filepath']} is {a['audio_filepath']}" for a, b in pairs[:EXAMPLES]]
            symptom = f"{len(pairs)} of {len(rows)} utterances for {role} are in train under other names, byte by byte."
            yield _leak(file, len(pairs) / len(rows), symptom, {"utterances": len(pairs), "first": first}, 1.0)
    yield from _shared_texts(subject, set(shared) | train)


def _shared_texts(subject, told: set[str]):
    texts = {row["text"] for row in subject.rows.get("train", []) if len(row["text"].split()) >= 4}
    for role in ("validation", "test"):
        rows = [row for row in subject.rows.get(role, []) if len(row["text"].split()) >= 4]
        known = [row for row in rows if row["text"] in texts]
        if known and not {os.path.normpath(row["_at"].rpartition(":")[0]) for row in known} & told:
            share = len(known) / len(rows)
            if share < 0.02:
                continue  # people say the same short things
            finding = _leak(known[0]["_at"], share, f"{len(known)} of {len(rows)} sentences of {role} are, word by "
                            "word, in train too (as other recordings).",
                            {"sentences": len(known), "first": [row["text"] for row in known[:3]]}, 0.6)
            finding.weight = "warning" if share > 0.1 else "note"
            yield finding


def _leak(where: str, share: float, symptom: str, evidence: dict, confidence: float) -> Finding:
    return Finding(
        "data-leakage",
        "warning",
        symptom,
        "A model is measured on what it has learned by heart: the error rate says nothing about other speech, and the "
        "checkpoint that is kept is the one that memorised best.",
        {"share": round(share, 4), **evidence},
        ["take those utterances out of train, or split by speaker and recording"],
        confidence,
        where=where,
    )
