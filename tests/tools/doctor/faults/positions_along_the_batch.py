"""Positions as in PyTorch's tutorial, whose table is for (T, B, D), added to (B, T, D): one for each row of a batch."""

import math

import torch

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechTransformer


class Positions(torch.nn.Module):
    def __init__(self, width: int, longest: int = 2000):
        super().__init__()
        angle = torch.arange(longest)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(1e4) / width))
        self.register_buffer("table", torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, None])

    def forward(self, x):
        return x + self.table[: x.size(0)]


class Encoder(SpeechTransformer):
    def __init__(self, feat_in: int, hidden: int = 48):
        super().__init__(feat_in, hidden)
        self.inp = torch.nn.Sequential(self.inp, Positions(hidden))


FAULT = Fault("positions_along_the_batch", ("batch-leak",), "before", lambda folder: live(folder, mine(__name__)))
