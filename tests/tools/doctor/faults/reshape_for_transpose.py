"""(B, H, T) made into (B, T, H) by reshape, which mixes times and features."""

from torch import relu

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechRNN


class Encoder(SpeechRNN):
    def convolve(self, x, length):
        x = relu(self.conv2(relu(self.conv1(x))))
        B, H, T = x.shape
        return x.reshape(B, T, H)


FAULT = Fault("reshape_for_transpose", ("time-scrambled",), "before", lambda folder: live(folder, mine(__name__)))
