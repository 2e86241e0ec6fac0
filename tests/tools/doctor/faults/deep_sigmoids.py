"""Fourteen dense layers with sigmoids, as in the nineties: no gradient arrives at the first."""

from torch import nn, sigmoid

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechRNN


class Encoder(SpeechRNN):
    def __init__(self, feat_in):
        super().__init__(feat_in)
        self.dense = nn.ModuleList(nn.Linear(self.hidden, self.hidden) for _ in range(14))

    def convolve(self, x, length):
        x = super().convolve(x, length)
        for layer in self.dense:
            x = sigmoid(layer(x))
        return x


FAULT = Fault("deep_sigmoids", ("vanishes", "output-constant"), "before", lambda folder: live(folder, mine(__name__)))
