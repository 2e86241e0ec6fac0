"""Do audio and text belong together, by the ear of a model that has learned something already?"""

from __future__ import annotations

import random
from collections import Counter

import torch

from tools.doctor.audio import read_at
from tools.doctor.finding import Finding, Plot
from tools.doctor.labels import encode_text
from tools.doctor.languages import some
from tools.doctor.loss import reference
from tools.doctor.registry import NotExamined, check

UTTERANCES, LONGEST, OTHERS = 32, 8.0, 5
LEARNED = 0.7  # own text's loss by the best other text's, under which a model can tell them apart
DISTINCT = 0.6  # share of the texts heard in place of the manifest's that are each another one
ROWS, OTHERS_TEXT = 32, 0.3  # rows of validation, one after the other; share that has to be another row's text by ear


@check("heard", faults=("data-mismatched-text",), needs=("model", "manifests"))
def texts_are_those_that_are_heard(subject):
    """A model that has learned to tell texts apart finds the manifest's the most likely."""
    probe = subject.probe
    rows = some(_usable(subject.rows.get("train", [])))
    chosen = random.Random(subject.seed).sample(rows, min(UTTERANCES, len(rows)))
    heard = []
    with probe.ready(calibrate=False), torch.no_grad():
        for row in chosen:
            if (listened := _listen(probe, row)) is None:
                continue
            own, out, frames = listened
            losses = [_loss(out, frames, text) for text in (own, *_others(probe, row, rows))]
            if len(losses) > 2 and all(loss is not None for loss in losses):
                heard.append((losses[0], min(losses[1:]), row))
            if subject.seconds_left() < 2:
                break
    if len(heard) < 12:
        raise NotExamined("too few utterances can be compared")
    ratios = [own / max(other, 1e-6) for own, other, _ in heard]
    sure = sum(ratio < LEARNED for ratio in ratios)
    if sure < 0.4 * len(heard):
        raise NotExamined("the model has not learned to tell texts apart yet")
    wrong = [entry for entry, ratio in zip(heard, ratios) if ratio > 1.0]
    if len(wrong) < max(2, 0.06 * len(heard)):
        return
    share = len(wrong) / len(heard)
    yield Finding(
        "data-mismatched-text",
        "warning",
        f"The model tells most texts apart, but finds another text likelier than the manifest's for {len(wrong)} of "
        f"{len(heard)} utterances drawn from train.",
        "A part of the texts belongs to other audio: it sets a floor to the loss that no training goes below.",
        {"share": round(share, 3), "drawn": len(heard),
         "look at": [f"{row['_at']}: {row['text'][:60]!r}" for _, _, row in wrong[:5]]},
        ["listen to the utterances named; build the manifest again, joining audio and text by utterance id"],
        0.75,
        where=wrong[0][2]["_at"],
        plots=[Plot("Loss of the manifest's text by that of the likeliest other", "utterance, sorted", "ratio",
                    {"train": (list(range(len(ratios))), sorted(ratios))}, "over 1 the other text is likelier")],
    )


@check("heard", faults=("data-mismatched-text",), needs=("model", "manifests"))
def validation_texts_are_those_that_are_heard(subject):
    """Of the texts of validation a model that has learned hears in each utterance its own, not its neighbour's."""
    probe = subject.probe
    rows = _usable(subject.rows.get("validation", []))[:ROWS]
    with probe.ready(calibrate=False), torch.no_grad():
        listened = [(row, found) for row in rows if subject.seconds_left() > 2 and (found := _listen(probe, row)) is not None]
        texts = [own for _, (own, *_) in listened]
        heard = []  # (row, how many lines away the likeliest text is, that text, its loss by the own one's)
        for place, (row, (own, out, frames)) in enumerate(listened):
            losses = [_loss(out, frames, text) for text in texts]
            sums = [float("inf") if loss is None else loss * len(text) for loss, text in zip(losses, texts)]
            if sums[place] < float("inf"):
                best = min(range(len(sums)), key=sums.__getitem__)
                heard.append((row, best - place, listened[best][0]["text"], sums[best] / max(sums[place], 1e-6)))
    if len(heard) < 12:
        raise NotExamined("too few utterances of validation can be compared")
    own = sum(away == 0 for _, away, *_ in heard)
    wrong = [(row, away, text) for row, away, text, ratio in heard if away and ratio < LEARNED]
    # Before it has learned any audio is likeliest to be the shortest text.
    if own + len(wrong) < 0.4 * len(heard) or len({text for _, _, text in wrong}) < DISTINCT * len(wrong):
        raise NotExamined("the model cannot tell the texts of validation apart")
    if len(wrong) < OTHERS_TEXT * len(heard):
        return
    (steps, times), = Counter(away for _, away, _ in wrong).most_common(1)
    shifted = times > 0.6 * len(wrong)
    row, text = next((row, text) for row, away, text in wrong if not shifted or away == steps)
    yield Finding(
        "data-mismatched-text", "warning",
        f"In {len(wrong)} of {len(heard)} utterances of validation the model hears the text of another row"
        + (f", {abs(steps)} line{'s' * (abs(steps) > 1)} {'further down' if steps > 0 else 'further up'}." if shifted else "."),
        "The texts of validation belong to other audio. The model has learned and its error rate says that it has not: val_loss "
        "rises and val_wer stays near 1, as with overfitting.",
        {"of another row": len(wrong), "of its own": own, "compared": len(heard),
         "lines away, the most frequent": steps if shifted else None,
         "for instance": f"{row['text'][:60]!r} stands in the manifest, {text[:60]!r} is heard"},
        ["build the manifest of validation again, joining audio and text by utterance id"], 0.95, where=row["_at"])


def _usable(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["duration"] <= LONGEST and row["text"].strip()]


def _listen(probe, row: dict) -> tuple[list[int], torch.Tensor, torch.Tensor] | None:
    """(targets, log-probs (1, T, V+1), frames (1)) of a row; None where audio or text are broken, which is told elsewhere."""
    try:
        own = encode_text(probe, row["text"])
        audio = torch.from_numpy(read_at(row, probe.sample_rate).copy())[None].to(probe.device)
    except Exception:  # of any kind
        return None
    size = torch.tensor([audio.shape[1]], device=probe.device)
    out, frames = probe.model.forward(input_signal=audio, input_signal_length=size)[:2]
    return own, out.float(), frames


def _others(probe, row: dict, rows: list[dict]) -> list[list[int]]:
    """Targets of other texts of about the same length."""
    size = len(row["text"])
    near = [other for other in rows if 0.7 * size <= len(other["text"]) <= 1.3 * size and other["text"] != row["text"]]
    found = []
    for other in random.Random(size).sample(near, min(OTHERS, len(near))):
        try:
            found.append(encode_text(probe, other["text"]))
        except Exception:  # characters outside the labels: told elsewhere
            continue
    return found


def _loss(out, frames, target: list[int]) -> float | None:
    """CTC loss in nats a symbol; None where the target does not fit or is empty."""
    if not target or max(target) >= out.shape[2] - 1:
        return None
    targets = torch.tensor([target])
    loss = float(reference(out, targets, frames, torch.tensor([len(target)]), out.shape[2] - 1)[0])
    return loss / len(target) if loss < float("inf") else None
