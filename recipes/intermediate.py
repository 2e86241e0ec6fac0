"""Intermediate CTC (Lee and Watanabe 2021, arXiv 2102.03216) as NeMo has it: what our encoders leave for it, and the
intermediate loss over characters of a model whose last layer spells in sentencepiece tokens.

NeMo's `model.interctc` names layers (from 0) and weights; the encoder leaves the outputs of these layers in the registry
of AccessMixin, and the model puts its decoder and its loss on them.

Shapes: B batch, D' channels, t output frames, S targets.
"""

from __future__ import annotations

import torch
from torch import Tensor


def layers_to_capture(encoder) -> tuple[int, ...]:
    """The layers, from 0, whose outputs NeMo's intermediate CTC asks `encoder` for at this call; mostly none."""
    if not encoder.is_access_enabled(getattr(encoder, "model_guid", None)):
        return ()
    return tuple(encoder.access_cfg.get("interctc", {}).get("capture_layers", ()))


def leave_captured(encoder, outputs: dict[int, Tensor], lengths_B: Tensor) -> None:
    """Leaves the outputs (B, D', t) of the layers in the registry, under the names that NeMo looks for."""
    for layer, output_BDt in outputs.items():
        encoder.register_accessible_tensor(name=f"interctc/layer_output_{layer}", tensor=output_BDt)
        encoder.register_accessible_tensor(name=f"interctc/layer_length_{layer}", tensor=lengths_B)


def characters_of(targets_BS: Tensor, target_lengths_B: Tensor, tokenizer, labels) -> tuple[Tensor, Tensor]:
    """Targets in tokens to the same texts in characters: (B, S'), zero-padded, and their lengths (B).

    `tokenizer` is a NeMo tokenizer, `labels` the characters in their order; what is not among them is left out.
    """
    index = {label: position for position, label in enumerate(labels)}
    rows = zip(targets_BS.tolist(), target_lengths_B.tolist())
    texts = [tokenizer.ids_to_text(row[:length]) for row, length in rows]
    targets = [torch.tensor([index[c] for c in text if c in index], dtype=torch.long) for text in texts]
    lengths = torch.tensor([len(target) for target in targets], device=target_lengths_B.device)
    return torch.nn.utils.rnn.pad_sequence(targets, batch_first=True).to(targets_BS.device), lengths
