"""Attention of one's own whose mask hides padded queries too: a softmax over nothing is NaN, in the gradient too."""

import torch
from torch import nn

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechTransformer


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.norm = nn.Linear(width, 3 * width), nn.LayerNorm(width)

    def forward(self, x, valid):
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        scores = q @ k.transpose(1, 2) / x.shape[-1] ** 0.5
        scores = scores.masked_fill(~(valid[:, :, None] & valid[:, None, :]), float("-inf"))
        return x + torch.softmax(scores, dim=-1) @ v * valid[:, :, None]


class Encoder(SpeechTransformer):
    def __init__(self, feat_in, **more):
        super().__init__(feat_in, **more)
        self.layers = nn.ModuleList(Attention(self._feat_out) for _ in self.layers)

    def attend(self, layer, x, padding):
        return layer(x, ~padding)


FAULT = Fault("padded_rows_masked_out", ("explodes", "run-nan"), "before", lambda folder: live(folder, mine(__name__)))
