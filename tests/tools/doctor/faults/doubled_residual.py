"""The residual is added by the layer, and once more around it."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechTransformer


class Encoder(SpeechTransformer):
    def __init__(self, feat_in):
        super().__init__(feat_in, layers=10)

    def attend(self, layer, x, padding):
        return x + super().attend(layer, x, padding)


def make(folder):
    return live(folder, mine(__name__))


FAULT = Fault("doubled_residual", ("explodes",), "before", make)
