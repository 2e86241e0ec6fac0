"""Convolutions at half the rate, brought back to the full rate by `repeat`, which tiles the sequence.

Meant was `repeat_interleave`, each frame twice. As in a U-Net the full rate also goes past them.
"""

import torch
from torch import nn

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import Encoder as Base
from tests.tools.doctor.setups.encoders import mask


class Encoder(Base):
    def __init__(self, feat_in: int, hidden: int = 48, layers: int = 4):
        super().__init__()
        self._feat_in, self._feat_out = feat_in, hidden
        self.first = nn.Conv1d(feat_in, hidden, 1, 2)
        self.down = nn.Conv1d(hidden, hidden, 3, 2, 1)
        self.convs = nn.ModuleList(nn.Conv1d(hidden, hidden, 3, padding=1) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(layers))
        self.last = nn.LayerNorm(hidden)

    def upsampled(self, x, frames: int):
        """(B, D, T / 2) to (B, D, T)."""
        return x.repeat(1, 1, 2)[:, :, :frames]

    def encode(self, x, length):
        x = self.first(x)
        length = torch.div(length - 1, 2, rounding_mode="floor") + 1
        valid = mask(length, x.shape[2])[:, None, :]
        y = self.down(x * valid)
        half = mask(torch.div(length + 1, 2, rounding_mode="floor"), y.shape[2])[:, None, :]
        for conv, norm in zip(self.convs, self.norms):
            y = y + torch.relu(norm(conv(y * half).transpose(1, 2))).transpose(1, 2)
        x = x + self.upsampled(y, x.shape[2])
        return self.last(x.transpose(1, 2)).transpose(1, 2) * valid, length


FAULT = Fault("frames_tiled_on_upsampling", ("time-scrambled",), "before", lambda folder: live(folder, mine(__name__)))
