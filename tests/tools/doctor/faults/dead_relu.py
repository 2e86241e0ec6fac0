"""Biases drawn like the weights with a mean that slipped to -5: no unit of the last layer is ever on."""

from torch import nn, relu

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechRNN


class Encoder(SpeechRNN):
    def __init__(self, feat_in):
        super().__init__(feat_in)
        nn.init.normal_(self.out.bias, -5.0, 0.05)

    def project(self, x):
        return relu(self.out(x))


FAULT = Fault(
    "dead_relu", ("output-constant", "vanishes", "no-gradient"), "before", lambda folder: live(folder, mine(__name__))
)
