"""A universal transformer: one layer, used four times on purpose, told by a learned vector which time it is."""

import torch
from torch import nn

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechTransformer, mask


class Encoder(SpeechTransformer):
    def __init__(self, feat_in, hidden: int = 48, depth: int = 4):
        super().__init__(feat_in, hidden, layers=1)
        self.step = nn.Parameter(0.02 * torch.randn(depth, hidden))

    def encode(self, x, length):
        x = self.inp(self.stacked(x * mask(length, x.shape[2])[:, None, :]))
        length = torch.div(length + self.stack - 1, self.stack, rounding_mode="floor")
        valid = mask(length, x.shape[1])
        x = x * valid[:, :, None]
        x = x + self.positions(x.transpose(1, 2)).transpose(1, 2)
        for step in self.step:
            x = self.attend(self.layers[0], x + step, ~valid)
        return (self.norm(x) * valid[:, :, None]).transpose(1, 2), length


HEALTHY = Healthy("one_layer_four_times", "before", lambda folder: live(folder, mine(__name__)))
