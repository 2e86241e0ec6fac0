"""A stride went from a third convolution; the lengths are still divided by eight, the output is a quarter."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechRNN


class Encoder(SpeechRNN):
    def encode(self, x, length):
        x, _ = super().encode(x, length)
        return x, (length // 8).clamp(min=1)


FAULT = Fault("lengths_divided_twice", ("length-mismatch",), "before", lambda folder: live(folder, mine(__name__)))
