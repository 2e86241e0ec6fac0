"""A loop over layers that hands each of them what the front end gave: only the last one's output goes on."""

import torch
from torch import nn

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import Encoder as Base
from tests.tools.doctor.setups.encoders import mask


class Encoder(Base):
    """Narrow convolutions with LayerNorm, which see a letter only where they are stacked."""

    def __init__(self, feat_in: int, hidden: int = 48, layers: int = 6):
        super().__init__()
        self._feat_in, self._feat_out = feat_in, hidden
        self.first = nn.Conv1d(feat_in, hidden, 1, 2)
        self.convs = nn.ModuleList(nn.Conv1d(hidden, hidden, 3, padding=1) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(layers))

    def layer(self, conv, norm, x, valid):
        y = torch.relu(norm(conv(x * valid[:, None, :]).transpose(1, 2))).transpose(1, 2)
        return x + y

    def encode(self, x, length):
        x = self.first(x)
        length = torch.div(length - 1, 2, rounding_mode="floor") + 1
        valid = mask(length, x.shape[2])
        for conv, norm in zip(self.convs, self.norms):
            y = self.layer(conv, norm, x, valid)
        return y * valid[:, None, :], length


FAULT = Fault("every_layer_reads_the_first", ("no-gradient",), "before", lambda folder: live(folder, mine(__name__)))
