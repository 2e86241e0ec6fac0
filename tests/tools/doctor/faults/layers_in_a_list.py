"""Layers in a Python list instead of a ModuleList: the optimizer never hears of them."""

from torch import nn

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechTransformer


class Encoder(SpeechTransformer):
    def __init__(self, feat_in):
        super().__init__(feat_in)
        self.heart = [nn.Linear(48, 48) for _ in range(6)]

    def attend(self, layer, x, padding):
        for linear in self.heart:
            x = linear(x).tanh()
        return super().attend(layer, x, padding)


FAULT = Fault("layers_in_a_list", ("not-in-optimizer",), "before", lambda folder: live(folder, mine(__name__)))
