"""What goes into a transformer is divided by the root of the width where it is multiplied: positions drown it."""

import math

import torch

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechTransformer


class Encoder(SpeechTransformer):
    def __init__(self, feat_in):
        super().__init__(feat_in, hidden=144)

    def encode(self, x, length):
        width, frames = self._feat_out, x.shape[2] // self.stack + 1
        turn = torch.arange(frames)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(1e4) / width))
        places = torch.stack([turn.sin(), turn.cos()], dim=2).flatten(1)
        self.positions.forward = lambda y: (y / math.sqrt(width) - y) + places[: y.shape[2]].T.to(y)
        return super().encode(x, length)


def make(folder):
    return live(folder, mine(__name__), width=144)


FAULT = Fault("content_divided_by_the_root", ("output-constant",), "before", make)
