"""The vocabulary: labels that are sound, tokens that the texts use and that cover them. No torch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tools.doctor.finding import Finding
from tools.doctor.languages import some
from tools.doctor.registry import NotExamined, check
from tools.doctor.spelling import long_labels

RARE = 5  # occurrences under which a token is hardly learned


def _finding(weight, symptom, cause, evidence, fix, confidence, where) -> Finding:
    return Finding("tokenizer-vocabulary", weight, symptom, cause, evidence, fix, confidence, where=where)


@check("tokenizer", faults=("tokenizer-vocabulary",), needs=("config",))
def labels_are_sound(subject):
    """Character labels are single, each once, and as many as the decoder has."""
    s = subject.settings
    labels = subject.labels
    if s.get("model.tokenizer") is not None or not labels:
        raise NotExamined("the model has no character labels")
    key = s.key("model.decoder.vocabulary")
    twice = [label for label, count in Counter(labels).items() if count > 1]
    if twice:
        yield _finding(
            "warning", f"Labels stand twice: {twice[:10]}.",
            "Two outputs stand for one letter: texts use the one, the model may print the other. YAML also reads a "
            "bare y or "
            "n as a boolean.", {"twice": twice}, [f"{key}: each label once, quoted"], 0.9, key)
    rows = subject.rows.get("train", []) if subject.has("manifests") else []
    texts, long = some(rows), long_labels(labels)
    used = Counter(char for row in texts for char in row["text"])
    words = Counter(word for row in texts for word in row["text"].split(" ")) if long else Counter()
    # Without texts nothing says whether a label is a word of theirs.
    idle = [label for label in labels if len(label) != 1 and not words[label] and (rows or label not in long)]
    if idle:
        yield _finding(
            "warning",
            f"{len(idle)} labels are not single characters{', and no word of the texts' * bool(rows)}: {idle[:10]}.",
            "Texts are read character by character, but for words that are a label as a whole: such a label is never "
            "used (YAML turns a bare y into True).",
            {"labels": idle[:20]},
            [f"{key}: quote every label; in the texts, spaces around those of several characters"], 0.9, key)
    sizes = {s.key(k): int(n) for k in ("model.decoder.num_classes",) if (n := s.number(k)) and n > 0}
    wrong = {k: n for k, n in sizes.items() if n != len(labels)}
    if wrong:
        yield _finding("prevents", f"{next(iter(wrong))} is {next(iter(wrong.values()))}, there are {len(labels)} "
                                   "labels.",
                       "The decoder has another number of outputs than there are labels (the blank is added to them by "
                       "NeMo).",
                       {**wrong, "labels": len(labels)}, [f"{k}={len(labels)}" for k in wrong], 0.95, next(iter(wrong)))
    if rows:
        phonemes = sum(words[label] for label in set(labels)) > 0.5 * words.total()  # which need no spaces
        if " " in used and " " not in labels and not phonemes:
            yield _finding("warning", "Texts have spaces, the labels have none.",
                           "Words cannot be told apart in what is printed; the word error rate is 100 %.",
                           {"spaces": used[" "]}, [f"{key}: add ' '"], 0.9, key)
        unused = [label for label in labels if not used[label] and not words[label]]
        if len(unused) > max(0.3 * len(labels), 3) and len(rows) > 200:
            yield _finding("note", f"{len(unused)} of {len(labels)} labels occur in no text of train: {unused[:20]}.",
                           "They are never learned. Fewer labels make the task a little easier; it does no harm.",
                           {"unused": unused}, [f"{key}: leave them out"], 0.5, key)


@check("tokenizer", faults=("label-order",), needs=("config",))
def labels_in_one_order(subject):
    """The data sets number the labels as the decoder does."""
    s = subject.settings
    vocabulary = subject.labels
    if s.get("model.tokenizer") is not None or not vocabulary:
        raise NotExamined("the model has no character labels")
    for section in ("train_ds", "validation_ds"):
        # NeMo's loader takes its own section's labels where there are any, and only warns that they differ.
        given = s.get(f"model.{section}.labels") or s.get("model.labels")
        labels = [str(label) for label in given] if given else vocabulary
        off = [i for i, (a, b) in enumerate(zip(labels, vocabulary)) if a != b]
        if not off:
            continue
        key = s.key(f"model.{section}.labels")
        train = section == "train_ds"
        yield Finding(
            "label-order", "prevents" if train else "warning",
            f"{key} counts {len(off)} of {len(vocabulary)} labels otherwise than the decoder: index {off[0]} is "
            f"{labels[off[0]]!r} in the targets and {vocabulary[off[0]]!r} in what is printed.",
            "The model learns well, by the targets' numbers, and prints a cipher: the loss is good and every word is "
            "wrong." if train else "Validation counts errors that are none: its loss and its error rate are those of "
                                   "other texts.",
            {"labels that differ": len(off), "in the data set": labels[:32], "in the decoder": vocabulary[:32]},
            [f"one list for all: {key}=${{model.labels}} {s.key('model.decoder.vocabulary')}=${{model.labels}}"],
            0.95, where=key)


class Part(NamedTuple):
    """A tokenizer: of all texts, or of one language of an aggregate."""

    language: str  # "" of the only one
    kind: str  # "bpe" or "wpe"
    key: str  # of its section
    path: str  # of its file, "" where nothing says where that is


def parts(s) -> list[Part]:
    """The tokenizers that a configuration names, as NeMo's mixin of tokenizers reads it."""
    if str(s.get("model.tokenizer.type", "")).lower() != "agg":
        return [_part(s, "model.tokenizer", "")]
    languages = s.get("model.tokenizer.langs")
    return [_part(s, f"model.tokenizer.langs.{name}", str(name)) for name in languages or ()]


def _part(s, key: str, language: str) -> Part:
    kind = str(s.get(f"{key}.type", "bpe")).lower()
    own, usual = ("vocab_path", "vocab.txt") if kind == "wpe" else ("model_path", "tokenizer.model")
    folder = s.get(f"{key}.dir")
    return Part(language, kind, key, str(s.get(f"{key}.{own}") or (Path(str(folder)) / usual if folder else "")))


def _elsewhere(subject, found: list[Part]) -> str | None:
    """Why a tokenizer need not be where the configuration says, None where it must."""
    s = subject.settings
    if any(part.path.startswith("nemo:") for part in found) or subject.has("model") or subject.given_model is not None:
        return "the tokenizer is inside the model"
    if subject.run is not None or subject.given_config is None:
        return "the tokenizer was where the run was made, and is not here"
    if any(s.get(f"model.{part}") is not None for part in ("joint", "aux_ctc")):
        return "the model is a transducer or hybrid, and its tokenizer is not here"
    if (s.fine_tunes or s.get("init_from_pretrained_model")) and not s.get("model.tokenizer.update_tokenizer"):
        return "it is inside the model that the configuration starts from"
    return None


@check("tokenizer", faults=("tokenizer-vocabulary", "data-upper-case"), needs=("config", "manifests"))
def tokens_cover_texts(subject):
    """The tokenizer is there, spells the texts, and its tokens are used often enough to be learned."""
    s = subject.settings
    if s.get("model.tokenizer") is None:
        raise NotExamined("the model has no tokenizer")
    found = parts(s)
    absent = next((part for part in found if not Path(part.path).is_file()), None)
    if absent is not None:
        if (why := _elsewhere(subject, found)) is not None:
            raise NotExamined(why)
        key = s.key(f"{absent.key}.dir")
        yield _finding("prevents", f"There is no tokenizer at {absent.path or f'{key}, which is not set'}.",
                       "The model cannot be built without it.", {"path": absent.path, "type": absent.kind},
                       ["python -m manifests.tokenizer TRAIN.json --out DIR (stage 2 of run.sh)"]
                       * (absent.kind == "bpe") + [f"{key}=DIR"], 1.0, key)
        return
    judged = False
    for part in found:
        rows = [row for row in subject.rows.get("train", []) if not part.language or row.get("lang") == part.language]
        if part.kind == "bpe" and len(rows) >= 20:
            judged = True
            yield from _covered(part, rows)
    if not judged:
        raise NotExamined("word pieces are not counted here" if any(part.kind == "wpe" for part in found)
                          else "too few texts")


def _covered(part: Part, rows: list[dict]):
    """What a sentencepiece model makes of the texts of rows."""
    import sentencepiece

    path = part.path
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=path)
    except (RuntimeError, OSError) as error:
        yield _finding("prevents", f"{path} cannot be read: {' '.join(str(error).split())[:150]}.",
                       "The file is broken or no sentencepiece model.", {}, ["make it again: python -m "
                                                                             "manifests.tokenizer"],
                       1.0, path)
        return
    counts, unknown, characters = Counter(), 0, 0
    for row in some(rows):
        ids = processor.encode(row["text"])
        counts.update(ids)
        unknown += ids.count(processor.unk_id())
        characters += len(row["text"])
    total, size = sum(counts.values()), processor.get_piece_size()
    share = unknown / max(total, 1)
    if share > 0.002:
        capitals = sum(row["text"] != row["text"].lower() for row in rows) / len(rows)
        yield Finding(
            "data-upper-case" if capitals > 0.2 and share > 0.2 else "tokenizer-vocabulary",
            "prevents" if share > 0.05 else "warning",
            f"{share:.1%} of the tokens of the training texts are unknown to the tokenizer.",
            "It was trained on other texts (another case, another language, another normalisation): what it does not "
            "know is "
            "lost.", {"unknown": unknown, "of": total, "texts with capitals": round(capitals, 3)},
            ["lower-case the texts" if capitals > 0.2 else "train it on the texts of this corpus",
             "python -m manifests.tokenizer TRAIN.json --out DIR"], 0.95, where=path)
    rare = sum(counts[i] < RARE for i in range(size) if i != processor.unk_id() and not processor.is_control(i))
    if rare > 0.3 * size and total < 2000 * size:
        yield _finding(
            "warning", f"{rare} of {size} tokens occur fewer than {RARE} times in the training texts ({total} tokens).",
            "A token has to be heard often to be learned: the vocabulary is too large for this corpus (or was made for "
            "another).", {"rare": rare, "tokens": size, "characters a token": round(characters / max(total, 1), 2)},
            ["a smaller vocabulary: python -m manifests.tokenizer TRAIN.json --out DIR --vocab 128"], 0.8, path)


@check("tokenizer", faults=("tokenizer-vocabulary",), needs=("config", "manifests"))
def rows_say_their_language(subject):
    """Each row names a language that an aggregate tokenizer has."""
    s = subject.settings
    if s.get("model.tokenizer") is None or not (languages := {part.language for part in parts(s)} - {""}):
        return
    for role in ("train", "validation"):
        rows = [row for row in subject.rows.get(role, []) if row["text"]]
        wrong = [row for row in rows if row.get("lang") not in languages]
        if not wrong:
            continue
        field = s.options(role).lang_field
        named = Counter(str(row.get("lang")) for row in wrong)
        yield _finding(
            "prevents", f"{len(wrong)} of {len(rows)} rows of {role} have no `{field}` that model.tokenizer.langs has: "
            + ", ".join("none" if name == "None" else name for name, _ in named.most_common(5)) + ".",
            "An aggregate tokenizer takes the one of the row's language: NeMo ends with an error where there is none.",
            {"rows": len(wrong), "of": len(rows), "languages of the rows": dict(named.most_common(10)),
             "of the tokenizer": sorted(languages)},
            [f"give each row its \"{field}\", one of {', '.join(sorted(languages))}"], 1.0, wrong[0]["_at"])
