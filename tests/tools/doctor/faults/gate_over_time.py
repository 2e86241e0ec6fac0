"""A gated linear unit over axis 1, where (B, D, T) had its channels: in (B, T, D) one half of the time gates the other.

The output is half as long, which was taken for subsampling: the lengths are halved with it.
"""

import torch
from torch import nn

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechRNN, mask


class Encoder(SpeechRNN):
    def encode(self, x, length):
        x = self.convolve(x, length)
        length = self.lengths(length)
        x = nn.functional.pad(self.recur(x, length), (0, 0, 0, x.shape[1] % 2))
        x = self.project(nn.functional.glu(x, dim=1))
        length = torch.div(length + 1, 2, rounding_mode="floor")
        return (x * mask(length, x.shape[1])[:, :, None]).transpose(1, 2), length


FAULT = Fault("gate_over_time", ("time-scrambled",), "before",
              lambda folder: live(folder, mine(__name__, strides=[2, 1])))
