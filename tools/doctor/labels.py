"""From text to targets in training, from outputs to text in decoding: one order of labels, one blank."""

from __future__ import annotations

import unicodedata
from itertools import groupby

import torch

from tools.doctor.finding import Finding
from tools.doctor.registry import NotExamined, check


def training_encoder(probe):
    """The callable from text to targets that training uses, found where the model's own loader would take it from."""
    if hasattr(probe, "_training_encoder"):
        return probe._training_encoder
    model, encode = probe.model, None
    parser = _parser_of(getattr(model, "_train_dl", None))
    if parser is not None:
        encode = parser
    elif hasattr(model, "text_encoder"):
        encode = model.text_encoder()
    elif getattr(model, "tokenizer", None) is not None:
        encode = model.tokenizer.text_to_ids
    elif probe.vocabulary:
        from nemo.collections.common.parts.preprocessing.parsers import make_parser

        name = str(training_option(probe, "parser") or "en")
        try:
            encode = make_parser(labels=training_labels(probe), name=name,
                                 do_normalize=bool(training_option(probe, "normalize_transcripts")))
        except ValueError:
            raise NotExamined(f"NeMo has no parser {name!r} (train_ds.parser)") from None
    probe._training_encoder = encode
    return encode


def training_labels(probe) -> list[str]:
    """The labels that NeMo's loader is given: the training section's, else the model section's."""
    settings = probe.subject.settings
    for key in ("model.train_ds.labels", "model.labels"):
        value = settings.get(key) if settings is not None else None
        if value:
            return [str(label) for label in value]
    cfg = getattr(probe.model, "_cfg", None)
    for section in (cfg.get("train_ds") if cfg is not None else None, cfg):
        if section is not None and section.get("labels"):
            return [str(label) for label in section.labels]
    return probe.vocabulary


def training_option(probe, name: str):
    """An option of the training section, of the settings or else of the model's own; None where neither has it."""
    settings = probe.subject.settings
    value = settings.get(f"model.train_ds.{name}") if settings is not None else None
    if value is not None:
        return value
    cfg = getattr(probe.model, "_cfg", None)
    section = cfg.get("train_ds") if cfg is not None else None
    return section.get(name) if section is not None else None


def as_encoded(probe, text: str) -> str:
    """The text that its targets ought to spell: cleaned where training cleans it (`normalize_transcripts`).

    Characters that are no label at all are left out: the data family says so, and how many they are.
    """
    encode = training_encoder(probe)
    if getattr(encode, "_do_normalize", False) and hasattr(encode, "_normalize"):
        text = encode._normalize(text) or ""
    known = {*training_labels(probe), *probe.vocabulary} if probe.labels is not None else set()
    if known and all(len(label) == 1 for label in known):
        text = "".join(char for char in text if char in known)
    return text


def _parser_of(loader):
    """The parser or tokenizer inside a live loader's dataset."""
    dataset = getattr(loader, "dataset", None)
    for _ in range(4):
        if dataset is None:
            return None
        for path in (("manifest_processor", "parser"), ("parser",), ("encode",), ("tokenizer",)):
            found = dataset
            for name in path:
                found = getattr(found, name, None)
            if found is not None:
                tokenizer = getattr(found, "_tokenizer", found)  # NeMo wraps tokenizers for lhotse
                text_to_ids = getattr(tokenizer, "text_to_ids", None)
                if text_to_ids is not None or callable(tokenizer):
                    return text_to_ids or tokenizer
        inner = getattr(dataset, "datasets", None)
        dataset = inner[0] if inner else getattr(dataset, "dataset", None)
    return None


def encode_text(probe, text: str) -> list[int]:
    """Targets of a text as training makes them; raises what that raises."""
    encode = training_encoder(probe)
    if encode is None:
        raise NotExamined("there is nothing that turns text into targets")
    target = encode(text, language_of(probe, text)) if one_of_each(probe) else encode(text)
    return [int(i) for i in target] if target is not None else []


def one_of_each(probe) -> dict:
    """Language -> tokenizer, of a tokenizer that is made of one for each; {} for others."""
    return getattr(getattr(probe.model, "tokenizer", None), "tokenizers_dict", None) or {}


def language_of(probe, text: str) -> str:
    """The language that the manifests give for a text. Raises NotExamined where they give none that has a tokenizer."""
    if not hasattr(probe, "_languages"):
        rows = (row for rows in probe.subject.rows.values() for row in rows)
        probe._languages = {row["text"]: str(row.get("lang", "")) for row in rows}
    language = probe._languages.get(text, "")
    if language not in one_of_each(probe):
        raise NotExamined(f"the tokenizer is one of {', '.join(one_of_each(probe))}, and `lang` of the rows is "
                          f"{language or 'not there'}")
    return language


def decode_frames(probe, frames: list[int], width: int | None = None) -> str:
    """What the model's decoding makes of these labels, one a frame."""
    width = width or len(probe.vocabulary) + 1
    log_probs = torch.full((1, len(frames), width), -20.0, device=probe.device)
    log_probs[0, torch.arange(len(frames)), torch.tensor(frames)] = 0.0
    out = probe.model.decoding.ctc_decoder_predictions_tensor(
        decoder_outputs=log_probs.log_softmax(-1),
        decoder_lengths=torch.tensor([len(frames)], device=probe.device),
        return_hypotheses=False,
    )
    first = out[0] if not isinstance(out, tuple) else out[0][0]
    first = first[0] if isinstance(first, list) else first
    return first if isinstance(first, str) else first.text


def must_decode(probe) -> None:
    """Raises NotExamined where the model has no decoding of NeMo's kind, or next to no labels."""
    if getattr(probe.model, "decoding", None) is None or len(probe.vocabulary) < 3:
        raise NotExamined("the model has no decoding of NeMo's kind")


@check("labels", faults=("blank-index",), needs=("model",))
def decoder_blank(subject):
    """Decoding drops the blank, and nothing else."""
    probe = subject.probe
    must_decode(probe)
    width = len(probe.vocabulary) + 1
    with probe.ready(calibrate=False), torch.no_grad():
        x, lengths = probe.features()
        made = probe.forward(x, lengths)[0].shape[2]
        if made != width:
            yield Finding(
                "blank-index",
                "prevents",
                f"The model has {made} outputs for {width - 1} labels and a blank, which are {width}.",
                "Outputs and labels do not belong together: the blank is the last output by NeMo's rule, here another "
                "index stands there, or some labels have no output.",
                {"outputs": made, "labels": width - 1},
                [f"model.decoder.num_classes={width - 1} (the blank is added to it)"],
                0.95,
                where="decoder",
            )
            return
        # Two different letters around what is examined: a blank leaves nothing between them.
        kept = _dropped(probe, [width - 1, 0, 1], width)
        blank = getattr(probe.model.decoding, "blank_id", None)
    if kept.get(width - 1) is False or kept.get(0) is True and kept.get(width - 1) is not True:
        wrong = [i for i, dropped in kept.items() if dropped]
        yield Finding(
            "blank-index",
            "prevents",
            f"Decoding does not treat output {width - 1}, the model's blank, as the blank"
            + (f", but output {wrong[0]} ({probe.label_names(wrong[:1])!r})." if wrong else "."),
            "Loss and decoder put the blank at different places: what is printed has letters in place of blanks, "
            "however "
            "well the model has learned.",
            {"blank of the decoding": blank if blank is not None else wrong, "blank of the model": width - 1},
            ["leave decoding to NeMo's CTCDecoding(cfg.decoding, vocabulary=decoder.vocabulary), which puts it last"],
            0.95,
            where="decoding",
        )


@check("labels", faults=("metric-not-collapsed",), needs=("model",))
def decoder_collapses(subject):
    """Decoding makes one letter of equal neighbours."""
    probe = subject.probe
    must_decode(probe)
    plain = _two_letters(probe)
    if len(plain) < 2:
        raise NotExamined("fewer than two labels are letters")
    a, b = plain
    with probe.ready(calibrate=False), torch.no_grad():
        once, twice = decode_frames(probe, [a, b]), decode_frames(probe, [a, a, b, b])
    if not keeps_doubles(probe):
        yield Finding(
            "metric-not-collapsed",
            "warning",
            f"Decoding makes one letter of two that a blank parts: of {probe.label_names([a])!r}, blank, "
            f"{probe.label_names([a])!r}, {probe.label_names([b])!r} it makes {once!r}.",
            "Blanks are taken out before equal neighbours are made one. Then no letter is ever doubled: 'hello' is printed as "
            "'helo', and counts as an error, however well the model has learned. The blank is there to part them.",
            {"decoded": once},
            ["first equal neighbours to one, then blanks out: [k for k, _ in itertools.groupby(best) if k != blank]",
             "leave decoding to NeMo's CTCDecoding(cfg.decoding, vocabulary=decoder.vocabulary)"],
            0.95,
            where="decoding",
        )
    if once != twice:
        yield Finding(
            "metric-not-collapsed",
            "warning",
            f"Decoding makes {twice!r} of the frames {''.join(probe.label_names([a, a, b, b]))!r}, and not {once!r}.",
            "CTC repeats a letter for as long as it is heard: equal neighbours are one letter. What is printed "
            "stutters, and nearly every word counts as wrong, however well the model has learned.",
            {"decoded": twice, "with repeats collapsed": once},
            ["leave decoding to NeMo's CTCDecoding(cfg.decoding, vocabulary=decoder.vocabulary)",
             "or: [k for k, _ in itertools.groupby(best) if k != blank]"],
            0.95,
            where="decoding",
        )


def keeps_doubles(probe) -> bool:
    """Whether decoding leaves a letter doubled where a blank parts the two; call it where there are two letters."""
    a, b = _two_letters(probe)
    with probe.ready(calibrate=False), torch.no_grad():
        parted = decode_frames(probe, [a, len(probe.vocabulary), a, b])
        return parted != decode_frames(probe, [a, b])


def _two_letters(probe, without: list[int] = ()) -> list[int]:
    """Indices of two labels that leave something in a text, `without` left out; fewer where there are no more."""
    return [i for i, label in enumerate(probe.vocabulary) if label.strip() and i not in without][:2]


def _dropped(probe, indices: list[int], width: int) -> dict[int, bool]:
    """Index -> whether decoding leaves nothing of it between two letters."""
    found = {}
    plain = _two_letters(probe, indices)
    if len(plain) < 2:
        return found
    a, b = plain
    alone = decode_frames(probe, [a, b], width)  # no repeats: whether those are collapsed is another matter
    for index in indices:
        try:
            found[index] = decode_frames(probe, [a, index, b], width) == alone
        except (IndexError, KeyError):
            found[index] = False  # decoding looks for a label at the blank's place
    return found


@check("labels", faults=("label-order", "tokenizer-vocabulary", "metric-normalisation"), needs=("model",))
def text_survives(subject):
    """Text that is turned into targets as in training, and back as in decoding, is the same text."""
    probe = subject.probe
    must_decode(probe)
    texts = [row["text"] for row in subject.rows.get("train", [])[:200]] or _sentences(probe)
    width = len(probe.vocabulary)
    blank = width
    changed: list[tuple[str, str]] = []
    beyond, compared = 0, 0
    doubles = len(_two_letters(probe)) < 2 or keeps_doubles(probe)  # else that is what is told
    with probe.ready(calibrate=False), torch.no_grad():
        for text in dict.fromkeys(texts):
            try:
                target = encode_text(probe, text)
            except NotExamined:
                raise
            except Exception:  # characters outside the labels: the data family says so
                continue
            if not target or compared >= 40:
                continue
            compared += 1
            if max(target) >= width or min(target) < 0:
                beyond += 1
                continue
            frames = [frame for index in target for frame in (index, blank)]
            back = decode_frames(probe, frames)
            spelt = as_encoded(probe, text)
            if _letters(back, doubles) != _letters(spelt, doubles):
                changed.append((spelt, back))
    if not compared:
        raise NotExamined("no text can be turned into targets")
    if beyond:
        yield Finding(
            "blank-index",
            "prevents",
            f"{beyond} of {compared} texts get targets outside 0 to {width - 1}, the model's labels.",
            "Targets hold the blank's index or one beyond it: labels in training are more than the outputs, or are "
            "counted from 1.",
            {"labels": width, "texts": beyond},
            ["use the same list of labels for model.labels, train_ds.labels and decoder.vocabulary"],
            0.9,
            where="train_ds.labels",
        )
    if len(changed) > 0.3 * compared:
        same = sum(_plain(back) == _plain(spelt) for spelt, back in changed)
        yield _written_otherwise(changed, compared) if same == len(changed) else _changed(probe, changed, compared)


def _letters(text: str, doubles: bool = True) -> str:
    """A text without its spaces; without `doubles` each run of one letter once."""
    letters = "".join(text.split())
    return letters if doubles else "".join(letter for letter, _ in groupby(letters))


def _plain(text: str) -> str:
    """The letters and digits of a text, in lower case; ligatures and wide letters as plain ones, as sentencepiece's nmt_nfkc_cf
    makes them."""
    return "".join(char for char in unicodedata.normalize("NFKC", text).casefold() if char.isalnum())


def _written_otherwise(changed: list[tuple[str, str]], compared: int) -> Finding:
    text, back = changed[0]
    return Finding(
        "metric-normalisation", "warning",
        f"{len(changed)} of {compared} texts come back from decoding with the same letters, and written otherwise: "
        f"{text[:60]!r} becomes {back[:60]!r}.",
        "Decoding changes case, apostrophes or punctuation, and references keep them: right words count as errors. The labels are "
        "in order.",
        {"text": text[:100], "comes back as": back[:100]},
        ["leave texts as the labels spell them, or pass references and hypotheses through one function before they are counted"],
        0.95, where="decoding")


def _sentences(probe) -> list[str]:
    """Texts of the labels themselves where there is no manifest."""
    labels = [label for label in probe.vocabulary if len(label) == 1]
    if probe.labels is not None and labels:
        return ["".join(labels[i:] + labels[:i]).strip() for i in range(0, len(labels), 5)]
    return ["the quick brown fox jumps over the lazy dog", "she sells sea shells", "he was not there"]


def _changed(probe, changed, compared) -> Finding:
    text, back = changed[0]
    pairs = dict.fromkeys((a, b) for a, b in zip(_letters(text), _letters(back)) if a != b)
    lost = sum(len(_letters(b)) < 0.7 * len(_letters(a)) for a, b in changed) > 0.5 * len(changed)
    if lost:
        return Finding(
            "tokenizer-vocabulary", "prevents",
            f"{len(changed)} of {compared} texts lose letters on the way to targets: {text[:60]!r} becomes "
            f"{back[:60]!r}.",
            "The labels or the tokenizer cannot spell these texts: what is unknown is dropped.",
            {"text": text[:100], "after training's encoding and decoding": back[:100]},
            ["train the tokenizer on these texts, or normalise them as its training text was"], 0.9,
            where="tokenizer" if probe.labels is None else "labels",
        )
    training, decoding = training_labels(probe), probe.vocabulary
    differing = [i for i, (a, b) in enumerate(zip(training, decoding)) if a != b]
    return Finding(
        "label-order", "prevents",
        f"{len(changed)} of {compared} texts come back as others: {text[:60]!r} becomes {back[:60]!r}.",
        "Training numbers the labels in another order than decoding: the model learns well and prints a cipher.",
        {"text": text[:100], "comes back as": back[:100], "letters": [f"{a} -> {b}" for a, b in list(pairs)[:8]],
         "first label that differs": f"{differing[0]}: {training[differing[0]]!r} in training, "
                                     f"{decoding[differing[0]]!r} "
         "in decoding" if differing else "-"},
        ["one list of labels for all: model.train_ds.labels=${model.labels} model.decoder.vocabulary=${model.labels}"],
        0.95,
        where="train_ds.labels" if differing else "decoding",
    )
