"""Rotary positions written for (B, T, H, K), and given queries and keys as (B, H, T, K): they count the heads.

Nothing else in this encoder tells one time from another.
"""

import torch
from torch.nn import functional as F

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechTransformer, mask


def rotated(x):
    """Pairs of channels, turned by an angle that grows with the position, axis 1."""
    rates = 10000.0 ** (-torch.arange(0, x.shape[3], 2) / x.shape[3])
    angles = (torch.arange(x.shape[1])[:, None] * rates)[None, :, None, :]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()], dim=-1)


class Encoder(SpeechTransformer):
    def __init__(self, feat_in):
        super().__init__(feat_in)
        del self.positions

    def placed(self, q):
        return rotated(q)

    def attend(self, layer, x, padding):
        own, (B, T, D) = layer.self_attn, x.shape
        qkv = F.linear(layer.norm1(x), own.in_proj_weight, own.in_proj_bias).view(B, T, 3, own.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(self.placed(q), self.placed(k), v, attn_mask=~padding[:, None, None, :])
        x = x + own.out_proj(y.transpose(1, 2).reshape(B, T, D))
        return x + layer._ff_block(layer.norm2(x))

    def encode(self, x, length):
        x = self.inp(self.stacked(x * mask(length, x.shape[2])[:, None, :]))
        length = torch.div(length + self.stack - 1, self.stack, rounding_mode="floor")
        valid = mask(length, x.shape[1])
        for layer in self.layers:
            x = self.attend(layer, x, ~valid)
        return (self.norm(x) * valid[:, :, None]).transpose(1, 2), length


FAULT = Fault("rotary_positions_over_the_heads", ("order-unknown",), "before",
              lambda folder: live(folder, mine(__name__), corpus={"pace": 0.7}))
