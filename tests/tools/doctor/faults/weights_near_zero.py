"""Convolutions without normalisation whose weights are drawn with a standard deviation of 0.001."""

import torch

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechConv


class Encoder(SpeechConv):
    def __init__(self, feat_in: int, hidden: int = 48):
        super().__init__(feat_in, hidden)
        for conv in (self.first, *self.convs):
            torch.nn.init.normal_(conv.weight, std=0.001)
            torch.nn.init.zeros_(conv.bias)

    def encode(self, x, length):
        from tests.tools.doctor.setups.encoders import mask

        x = self.first(x * mask(length, x.shape[2])[:, None, :])
        length = torch.div(length - 1, self.stride, rounding_mode="floor") + 1
        valid = mask(length, x.shape[2])[:, None, :]
        for conv in self.convs:
            x = torch.relu(conv(x * valid))
        return x, length


FAULT = Fault("weights_near_zero", ("vanishes", "output-constant"), "before",
              lambda folder: live(folder, mine(__name__)))
