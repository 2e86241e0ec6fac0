"""Dropout that does not dominate a training step on CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS = 1 << 16


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """As ``torch.nn.functional.dropout``."""
    if not training or p == 0.0:
        return x
    if not _slow(x):
        return F.dropout(x, p)
    return x * _kept(x, p).mul_(1.0 / (1.0 - p))


class Dropout(nn.Dropout):
    """As ``torch.nn.Dropout``, by the function above."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p, self.training)


class LockedDropout(nn.Dropout):
    """Dropout of (B, T, D) with one mask for all times of an utterance, as Gal and Ghahramani 2016 (arXiv 1512.05287).

    A recurrent layer averages over the frames what is drawn anew for each of them; this it cannot.
    """

    def forward(self, x_BTD: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x_BTD
        return x_BTD * F.dropout(x_BTD.new_ones(x_BTD.shape[0], 1, x_BTD.shape[2]), self.p)


def add_branch(x: Tensor, branch: Tensor, p: float, training: bool, weight: float = 1.0) -> Tensor:
    """The residual ``x + weight * dropout(branch)``, without a pass over memory for each of its parts on CPU."""
    if not training or p == 0.0 or not _slow(x):
        return torch.add(x, F.dropout(branch, p, training), alpha=weight)
    return torch.addcmul(x, branch, _kept(branch, p), value=weight / (1.0 - p))


def _slow(x: Tensor) -> bool:
    """Where torch's own is: eager on CPU. Compiled code draws its random numbers in one pass with the rest."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _kept(like: Tensor, p: float) -> Tensor:
    """1 with probability 1 - p, else 0, in shape and type of ``like``.

    torch's bernoulli draws a number for each element, a tenth of a training step on CPU. Here four elements share 64
    random bits, which takes half the time or less; p is met to 1/65536.
    """
    words = torch.empty((like.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    bits = words.view(torch.int16)[: like.numel()].view(like.shape)
    return (bits >= round(p * STEPS) - STEPS // 2).to(like.dtype)
