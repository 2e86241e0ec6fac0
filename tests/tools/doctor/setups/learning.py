"""Plain training and scoring, with nothing of the doctor: how a set-up is shown to be healthy or harmed.

Everything goes through the model's own forward and the model's own loss, so that a fault there counts.
"""

from __future__ import annotations

import numpy as np
import torch

from recipes.metrics import count_errors
from tests.tools.doctor.setups.tones import RATE, samples


def encoder_of(model):
    """Text to targets as NeMo's data set does it: by its own labels, others dropped in silence."""
    if model.cfg.get("tokenizer"):
        return model.tokenizer.text_to_ids
    section = model.cfg.get("train_ds") or {}
    index = {label: i for i, label in enumerate(section.get("labels") or model.cfg.labels)}
    return lambda text: [index[c] for c in text if c in index]


def batch(model, rows: list[dict]):
    """(audio (B, samples), lengths (B), targets (B, S), target lengths (B))."""
    encode = encoder_of(model)
    audio = [torch.from_numpy(np.ascontiguousarray(samples(row))) for row in rows]
    targets = [torch.tensor(encode(row["text"]), dtype=torch.long) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    return (pad(audio, True), torch.tensor([len(a) for a in audio]), pad(targets, True),
            torch.tensor([len(t) for t in targets]))


def learn(model, rows: list[dict], steps: int = 100, lr: float = 1e-2, size: int = 8, seed: int = 0, optimizer=None,
          schedule=None, clip: float | None = 1.0, warm: int = 20) -> list[float]:
    """Losses of `steps` plain steps of AdamW over shuffled batches; `schedule(step)` gives the rate's factor."""
    generator = np.random.default_rng(seed)
    torch.manual_seed(seed)
    if optimizer is None:
        model.setup_optimizer_param_groups()  # what the model itself gives to its optimizer
        optimizer = torch.optim.AdamW(model._optimizer_param_groups, lr=lr)
    base = [group["lr"] for group in optimizer.param_groups]
    losses, order = [], []
    model.train()
    for step in range(steps):
        if len(order) < size:
            order = list(generator.permutation(len(rows)))
        chosen, order = order[:size], order[size:]
        audio, lengths, targets, target_lengths = batch(model, [rows[i] for i in chosen])
        for group, rate in zip(optimizer.param_groups, base):
            group["lr"] = rate * (schedule(step) if schedule else min((step + 1) / warm, 1.0))
        log_probs, out_lengths, _ = model.forward(input_signal=audio, input_signal_length=lengths)
        loss = model.loss(
            log_probs=log_probs, targets=targets, input_lengths=out_lengths, target_lengths=target_lengths
        )
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return losses


def transcribe(model, rows: list[dict], size: int = 16, padding: float = 0.0) -> list[str]:
    """Greedy texts by the model's own decoding, evaluating batches of `size` that are `padding` seconds too long."""
    model.eval()
    texts = []
    with torch.no_grad():
        for start in range(0, len(rows), size):
            audio, lengths, _, _ = batch(model, rows[start : start + size])
            audio = torch.nn.functional.pad(audio, (0, int(padding * RATE)))
            log_probs, out_lengths, _ = model.forward(input_signal=audio, input_signal_length=lengths)
            found = model.decoding.ctc_decoder_predictions_tensor(log_probs, decoder_lengths=out_lengths)
            texts += [text if isinstance(text, str) else text.text for text in found]
    return texts


def character_errors(model, rows: list[dict], size: int = 16, padding: float = 0.0) -> float:
    """Character error rate, 0 to above 1."""
    return count_errors([row["text"] for row in rows], transcribe(model, rows, size, padding))[1].rate
