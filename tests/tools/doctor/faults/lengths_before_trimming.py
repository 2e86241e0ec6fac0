"""The first 0.3 s are cut off inside the encoder; the lengths are those of before."""

import torch

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechConv


class Encoder(SpeechConv):
    def encode(self, x, length):
        x, _ = super().encode(x[:, :, 30:], (length - 30).clamp(min=1))
        return x, torch.div(length - 1, self.stride, rounding_mode="floor") + 1


FAULT = Fault("lengths_before_trimming", ("length-mismatch",), "before", lambda folder: live(folder, mine(__name__)))
