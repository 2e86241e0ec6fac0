"""The lengths returned are those of the features, four times those of the output."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechRNN


class Encoder(SpeechRNN):
    def encode(self, x, length):
        x, _ = super().encode(x, length)
        return x, length


FAULT = Fault("lengths_of_the_input", ("length-mismatch",), "before", lambda folder: live(folder, mine(__name__)))
