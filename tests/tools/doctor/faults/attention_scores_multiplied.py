"""Attention of one's own that multiplies scores by the root of the head's size where it divides by it."""

import math

from torch import nn

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechTransformer


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x, padding):
        B, T, D = x.shape
        y = self.norm(x)
        q, k, v = (to(y).view(B, T, self.heads, -1).transpose(1, 2) for to in (self.q, self.k, self.v))
        scores = (q @ k.transpose(-1, -2)) * math.sqrt(D // self.heads)
        weights = scores.masked_fill(padding[:, None, None], -1e9).softmax(dim=-1)
        return x + self.o((weights @ v).transpose(1, 2).reshape(B, T, D))


class Encoder(SpeechTransformer):
    def __init__(self, feat_in):
        super().__init__(feat_in, hidden=192)
        self.layers = nn.ModuleList(Attention(192, 2) for _ in range(3))

    def attend(self, layer, x, padding):
        return layer(x, padding)


def make(folder):
    return live(folder, mine(__name__), width=192)


FAULT = Fault("attention_scores_multiplied", ("vanishes",), "before", make)
