"""Mistakes in a DeepSpeech2 that still let it learn one batch.

Shapes: B batch, C channels, T time, F frequency, H hidden units.
"""

from __future__ import annotations

import torch
from nemo.core.classes.common import typecheck
from torch import nn

from recipes.deepspeech2.encoder import DeepSpeech2Encoder
from recipes.lengths import valid_mask
from recipes.recurrent import masked_input


class RecurrenceOverBatch(DeepSpeech2Encoder):
    """nn.GRU is given (B, T, D), but reads (T, B, D) unless batch_first says otherwise: it walks from one utterance of
    the batch to the next. On one batch in one order the neighbours identify the frame as well as anything."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.rnns = nn.ModuleList(
            nn.GRU(old.ahead.input_size, old.ahead.hidden_size, bidirectional=True) for old in self.rnns
        )

    @typecheck()
    def forward(self, audio_signal, length):
        x, length, mask_BT = front_end(self, audio_signal, length)
        B, C, T, F_out = x.shape
        x = x.permute(0, 2, 3, 1).reshape(B, T, F_out * C)
        for norm, rnn in zip(self.norms, self.rnns):
            forward, backward = rnn(self.dropout(norm(x, mask_BT)))[0].chunk(2, dim=2)
            x = forward + backward
        return self.dropout(self.out_norm(x, mask_BT)).transpose(1, 2), length


class ReshapeForTranspose(DeepSpeech2Encoder):
    """(B, C, T, F) is made (B, T, C F) by reshape alone: the shape is right and each frame holds a stretch of one
    channel over many moments. One batch can be learned by heart from it; where in it a sound stands cannot."""

    @typecheck()
    def forward(self, audio_signal, length):
        x, length, mask_BT = front_end(self, audio_signal, length)
        B, C, T, F_out = x.shape
        x = x.contiguous().reshape(B, T, C * F_out)
        for norm, rnn in zip(self.norms, self.rnns):
            x = rnn(self.dropout(norm(x, mask_BT)), length, mask_BT)
        return self.dropout(self.out_norm(x, mask_BT)).transpose(1, 2), length


def front_end(encoder, audio_signal: torch.Tensor, length: torch.Tensor):
    """Features (B, D, T) to what the convolutions give (B, C, T', F), lengths (B) and mask (B, T')."""
    length = length.long()
    x = masked_input(audio_signal, length).transpose(1, 2).unsqueeze(1)
    for layer in encoder.convs:
        length = layer.out_length(length)
        mask_BT = valid_mask(length, layer.out_length(x.shape[2]))
        x = layer(x, mask_BT)
    return x, length, mask_BT
