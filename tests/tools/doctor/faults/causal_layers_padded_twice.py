"""Causal convolutions that are padded by the layer and again by hand: each puts its output eight frames later."""

from torch import nn

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.healthy.causal_convolutions import Encoder as Healthy
from tests.tools.doctor.setups import live, mine


class Encoder(Healthy):
    def __init__(self, feat_in):
        super().__init__(feat_in)
        self.convs = nn.ModuleList(nn.Conv1d(48, 48, 9, padding=8) for _ in self.convs)


def make(folder):
    return live(folder, mine(__name__))


FAULT = Fault("causal_layers_padded_twice", ("time-scrambled",), "before", make)
