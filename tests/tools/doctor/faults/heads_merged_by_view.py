"""Attention of one's own whose heads (B, H, T, K) are put together by a reshape to (B, T, D), without a transpose."""

from torch.nn import functional as F

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechTransformer


class Encoder(SpeechTransformer):
    def attend(self, layer, x, padding):
        own, (B, T, D) = layer.self_attn, x.shape
        qkv = F.linear(layer.norm1(x), own.in_proj_weight, own.in_proj_bias).view(B, T, 3, own.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=~padding[:, None, None, :])
        x = x + own.out_proj(y.reshape(B, T, D))
        return x + layer._ff_block(layer.norm2(x))


FAULT = Fault("heads_merged_by_view", ("time-scrambled", "padding-leak"), "before",
              lambda folder: live(folder, mine(__name__)))
