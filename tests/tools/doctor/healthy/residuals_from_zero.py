"""ReZero: every residual branch goes through a gate that starts at 0, so that at first no branch has a gradient."""

import torch
from torch import nn

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechConv, mask


class Encoder(SpeechConv):
    def __init__(self, feat_in, layers: int = 6):
        super().__init__(feat_in, layers=layers)
        self.gates = nn.Parameter(torch.zeros(layers))

    def encode(self, x, length):
        x = self.first(x * mask(length, x.shape[2])[:, None, :])
        length = torch.div(length - 1, self.stride, rounding_mode="floor") + 1
        valid = mask(length, x.shape[2])
        x = torch.relu(self.normalise(self.norms[0], x, valid))
        for gate, conv, norm in zip(self.gates, self.convs, self.norms[1:]):
            x = x + gate * torch.relu(self.normalise(norm, conv(x), valid))
        return x, length


HEALTHY = Healthy("residuals_from_zero", "before", lambda folder: live(folder, mine(__name__)))
