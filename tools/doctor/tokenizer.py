"""The vocabulary: labels that are sound, tokens that the texts use and that cover them. No torch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tools.doctor.finding import Finding
from tools.doctor.registry import NotExamined, check

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
    long = [label for label in labels if len(label) != 1]
    if long:
        yield _finding(
            "prevents" if len(long) > 0.2 * len(labels) else "warning",
            f"{len(long)} labels are not single characters: {long[:10]}.",
            "Texts are read character by character: such a label is never used (YAML turns a bare y into True).",
            {"labels": long[:20]}, [f"{key}: quote every label"], 0.9, key)
    sizes = {s.key(k): int(n) for k in ("model.decoder.num_classes",) if (n := s.number(k)) and n > 0}
    wrong = {k: n for k, n in sizes.items() if n != len(labels)}
    if wrong:
        yield _finding("prevents", f"{next(iter(wrong))} is {next(iter(wrong.values()))}, there are {len(labels)} "
                                   "labels.",
                       "The decoder has another number of outputs than there are labels (the blank is added to them by "
                       "NeMo).",
                       {**wrong, "labels": len(labels)}, [f"{k}={len(labels)}" for k in wrong], 0.95, next(iter(wrong)))
    rows = subject.rows.get("train", []) if subject.has("manifests") else []
    if rows:
        used = Counter(char for row in rows for char in row["text"])
        if " " in used and " " not in labels:
            yield _finding("warning", "Texts have spaces, the labels have none.",
                           "Words cannot be told apart in what is printed; the word error rate is 100 %.",
                           {"spaces": used[" "]}, [f"{key}: add ' '"], 0.9, key)
        unused = [label for label in labels if not used[label]]
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


@check("tokenizer", faults=("tokenizer-vocabulary", "data-upper-case"), needs=("config", "manifests"))
def tokens_cover_texts(subject):
    """The tokenizer is there, spells the texts, and its tokens are used often enough to be learned."""
    s = subject.settings
    if s.get("model.tokenizer") is None:
        raise NotExamined("the model has no tokenizer")
    folder = s.tokenizer_dir
    key = s.key("model.tokenizer.dir")
    path = Path(folder) / "tokenizer.model" if folder else None
    if path is None or not path.is_file():
        made = subject.has("model")  # restored from a .nemo, which holds its own
        starts = s.fine_tunes or s.get("init_from_pretrained_model")
        if not made and starts and not s.get("model.tokenizer.update_tokenizer"):
            raise NotExamined("it is inside the model that the configuration starts from")
        if not made:
            yield _finding("prevents", f"There is no tokenizer at {folder or 'model.tokenizer.dir, which is not set'}.",
                           "The model cannot be built without it.", {"folder": folder},
                           ["python -m manifests.tokenizer TRAIN.json --out DIR (stage 2 of "
                            "run.sh)", f"{key}=DIR"], 1.0, key)
            return
        raise NotExamined("the tokenizer is inside the model")
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        yield _finding("prevents", f"{path} cannot be read: {' '.join(str(error).split())[:150]}.",
                       "The file is broken or no sentencepiece model.", {}, ["make it again: python -m "
                                                                             "manifests.tokenizer"],
                       1.0, str(path))
        return
    rows = subject.rows.get("train", [])
    if len(rows) < 20:
        raise NotExamined("too few texts")
    counts, unknown, characters = Counter(), 0, 0
    for row in rows[:: max(len(rows) // 20000, 1)]:
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
             "python -m manifests.tokenizer TRAIN.json --out DIR"], 0.95, where=str(path))
    rare = sum(counts[i] < RARE for i in range(size) if i != processor.unk_id() and not processor.is_control(i))
    if rare > 0.3 * size and total < 2000 * size:
        yield _finding(
            "warning", f"{rare} of {size} tokens occur fewer than {RARE} times in the training texts ({total} tokens).",
            "A token has to be heard often to be learned: the vocabulary is too large for this corpus (or was made for "
            "another).", {"rare": rare, "tokens": size, "characters a token": round(characters / max(total, 1), 2)},
            ["a smaller vocabulary: python -m manifests.tokenizer TRAIN.json --out DIR --vocab 128"], 0.8, str(path))
