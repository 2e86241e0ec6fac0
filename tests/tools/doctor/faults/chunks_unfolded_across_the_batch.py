"""Attention within chunks, which are folded into the batch (B, N, C, D) and taken out of it again as (N, B, C, D).

With one utterance in a batch all is right.
"""

import torch
from torch.nn.functional import pad

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechTransformer


class Encoder(SpeechTransformer):
    chunk = 16

    def unfolded(self, y, batch: int):
        """(B N, C, D) to (B, N C, D)."""
        return y.view(-1, batch, self.chunk, y.shape[2]).transpose(0, 1).flatten(1, 2)

    def attend(self, layer, x, padding):
        B, T, D = x.shape
        x, padding = pad(x, (0, 0, 0, -T % self.chunk)), pad(padding, (0, -T % self.chunk), value=True)
        padding = padding.reshape(-1, self.chunk)
        nothing = padding.all(dim=1, keepdim=True)  # a chunk of padding alone attends to itself
        y = super().attend(layer, x.reshape(-1, self.chunk, D), torch.where(nothing, False, padding))
        return self.unfolded(y, B)[:, :T]


FAULT = Fault("chunks_unfolded_across_the_batch", ("batch-leak", "time-scrambled"), "before",
              lambda folder: live(folder, mine(__name__)))
