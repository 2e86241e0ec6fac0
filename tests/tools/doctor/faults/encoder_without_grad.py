"""The whole encoder under torch.no_grad(), left over from extracting features with it."""

import torch

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechRNN


class Encoder(SpeechRNN):
    def encode(self, x, length):
        with torch.no_grad():
            return super().encode(x, length)


FAULT = Fault("encoder_without_grad", ("no-gradient",), "before", lambda folder: live(folder, mine(__name__)))
