"""Consistency regularisation: two views of an utterance, masked differently, must get the same outputs.

CR-CTC (Yao et al. 2024, arXiv 2410.05101), the best published CTC training on LibriSpeech. Each batch goes through
the model twice, as one batch of twice the size, with SpecAugment and dropout drawn anew for each half. To the mean
CTC loss of both halves comes the Kullback-Leibler divergence between their outputs, frame by frame, towards each
other's distribution taken as it is (no gradient through the target).

Shapes: B utterances, T output frames, V labels and blank.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from recipes.lengths import valid_mask


def two_views(*tensors: Tensor) -> list[Tensor]:
    """Each tensor (B, ...) behind itself, (2B, ...): item i and item B + i are the same utterance."""
    return [torch.cat([tensor, tensor]) for tensor in tensors]


def consistency_loss(log_probs: Tensor, lengths: Tensor) -> Tensor:
    """Divergence of the two views in nats, summed over the valid frames of an utterance: (B).

    `log_probs` (2B, T, V + 1) and `lengths` (2B) are those of `two_views`. The mean of both directions, as the CTC
    loss beside it is the mean of both views.
    """
    log_probs = log_probs.float()
    first, second = log_probs.chunk(2)
    other = torch.cat([second, first]).detach()
    frames_BT = F.kl_div(log_probs, other, reduction="none", log_target=True).sum(-1)
    per_view = frames_BT.masked_fill(~valid_mask(lengths, log_probs.shape[1]), 0.0).sum(-1)
    return per_view.view(2, -1).mean(0)
