"""Causal attention with linear biases (ALiBi) as query minus key: the farther back a frame, the more it is heard."""

import torch
from torch.nn import functional as F

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechTransformer, mask


class Encoder(SpeechTransformer):
    def __init__(self, feat_in):
        super().__init__(feat_in)
        del self.positions

    def distances(self, frames: int):
        steps = torch.arange(frames)
        return steps[:, None] - steps[None, :]

    def biases(self, heads: int, frames: int):
        """(H, T, T), minus infinity on what is yet to come."""
        slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)
        steps = torch.arange(frames)
        future = steps[None, :] > steps[:, None]
        return (slopes[:, None, None] * self.distances(frames)).masked_fill(future, float("-inf"))

    def attend(self, layer, x, padding):
        own, (B, T, D) = layer.self_attn, x.shape
        qkv = F.linear(layer.norm1(x), own.in_proj_weight, own.in_proj_bias).view(B, T, 3, own.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        bias = self.biases(own.num_heads, T)[None].masked_fill(padding[:, None, None, :], float("-inf"))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + own.out_proj(y.transpose(1, 2).reshape(B, T, D))
        return x + layer._ff_block(layer.norm2(x))

    def encode(self, x, length):
        x = self.inp(self.stacked(x * mask(length, x.shape[2])[:, None, :]))
        length = torch.div(length + self.stack - 1, self.stack, rounding_mode="floor")
        valid = mask(length, x.shape[1])
        for layer in self.layers:
            x = self.attend(layer, x, ~valid)
        return (self.norm(x) * valid[:, :, None]).transpose(1, 2), length


FAULT = Fault("linear_biases_of_the_wrong_sign", ("time-scrambled", "order-unknown"), "before",
              lambda folder: live(folder, mine(__name__)))
