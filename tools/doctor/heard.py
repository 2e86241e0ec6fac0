"""Do audio and text belong together, by the ear of a model that has learned something already?"""

from __future__ import annotations

import random

import torch

from tools.doctor.finding import Finding, Plot
from tools.doctor.labels import encode_text
from tools.doctor.loss import reference
from tools.doctor.registry import NotExamined, check

UTTERANCES, LONGEST, OTHERS = 32, 8.0, 5
LEARNED = 0.7  # own text's loss by the best other text's, under which a model can tell them apart


@check("heard", faults=("data-mismatched-text",), needs=("model", "manifests"))
def texts_are_those_that_are_heard(subject):
    """A model that has learned to tell texts apart finds the manifest's the most likely."""
    from recipes.data import read_audio

    probe = subject.probe
    rows = [row for row in subject.rows.get("train", []) if row["duration"] <= LONGEST and row["text"].strip()]
    chosen = random.Random(subject.seed).sample(rows, min(UTTERANCES, len(rows)))
    heard = []
    with probe.ready(calibrate=False), torch.no_grad():
        for row in chosen:
            try:
                own = encode_text(probe, row["text"])
                audio = torch.from_numpy(read_audio(row, probe.sample_rate).copy())[None].to(probe.device)
            except Exception:  # broken audio or text: told elsewhere
                continue
            size = torch.tensor([audio.shape[1]], device=probe.device)
            out, frames = probe.model.forward(input_signal=audio, input_signal_length=size)[:2]
            others = _others(probe, row, rows)
            texts = [own, *others]
            losses = [_loss(out.float(), frames, text) for text in texts]
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
