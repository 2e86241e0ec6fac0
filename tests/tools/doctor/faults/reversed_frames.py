"""The encoder flips time for a recurrence from the future and hands its output on as it is."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechRNN


class Encoder(SpeechRNN):
    def convolve(self, x, length):
        return super().convolve(x, length).flip(1)


FAULT = Fault("reversed_frames", ("time-scrambled",), "before", lambda folder: live(folder, mine(__name__)))
