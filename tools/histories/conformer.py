"""A mistake in a Conformer: masks of two conventions, one True on what is real and one True on what is not.

Shapes: B batch, t frames after subsampling, D units.
"""

from __future__ import annotations

import torch

from recipes.conformer.attention import relative_positions
from recipes.conformer.encoder import ConformerEncoder
from recipes.dropout import dropout
from recipes.lengths import valid_mask


class InvertedMask(ConformerEncoder):
    """The blocks are handed True on valid frames and hide what is True: attention and convolution see padding only."""

    def encode(self, x_BFT, length_B, capture=()):
        length_B = length_B.to(torch.int64)
        x_BtD = self.subsampling(x_BFT.transpose(1, 2), length_B)
        length_B = self.output_lengths(length_B)
        mask_Bt = valid_mask(length_B, x_BtD.shape[1])
        x_BtD = dropout(x_BtD, self.dropout_pre_encoder, self.training)
        pos_PD = relative_positions(x_BtD.shape[1], self.d_model, x_BtD.device, x_BtD.dtype)
        for layer in self.layers:
            x_BtD = layer(x_BtD, pos_PD, mask_Bt)
        return self._project(x_BtD), length_B, {}
