"""Multi-head self-attention with relative positions, for a padded batch.

Shapes: B batch, T frames, D model size, H heads, K = D / H.

Source: Dai et al. 2019 (Transformer-XL, arXiv 1901.02860, section 3.3 and appendix B), as used by the Conformer
(Gulati et al. 2020, section 2.1). The score of query i and key j is
``((q_i + u) k_j + (q_i + v) r_{i-j}) / sqrt(K)``; the second term is handed to torch's fused attention as its bias.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Finite, so that an item without any frame gives numbers and no NaN, and far enough for exp() to be 0 in float32;
# it fits float16 and bfloat16.
MASKED = -1e4


def relative_positions(frames: int, d_model: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Sinusoids (2T, D) of the distances T, T-1, ..., 0, ..., -(T-1) between query and key.

    Computed at each call, which is cheap and happens once for all layers: a stored table would have to grow with the
    longest utterance, and DDP would send it to all devices at each step. The distance T never occurs; its row makes
    the width even and the shift in ``shift_to_keys`` free.
    """
    distance = torch.arange(frames, -frames, -1.0, device=device, dtype=torch.float32)
    rate = torch.exp(torch.arange(0, d_model, 2, device=device, dtype=torch.float32) * (-math.log(1e4) / d_model))
    angle = distance[:, None] * rate
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1).to(dtype)


def shift_to_keys(by_distance: Tensor) -> Tensor:
    """(..., T, 2T), column c of row i being distance T - c, to (..., T, T) with distance i - j at row i, column j.

    A view. That element lies at column T - i + j, so at T + i * (2T - 1) + j of the flattened rows: drop the first T
    numbers, and the rest are rows 2T - 1 long that begin where they should.
    """
    frames = by_distance.shape[-2]
    return by_distance.flatten(-2)[..., frames:].unflatten(-1, (frames, 2 * frames - 1))[..., :frames]


class RelPositionAttention(nn.Module):
    """Self-attention over the real frames of each item.

    Args:
        d_model: D, a multiple of ``n_heads``.
        n_heads: H.
        dropout: on the attention weights.
        use_bias: biases in the projections of queries, keys, values and output.
        shared_bias: u and v (H, K) to share with other layers; None makes own ones, zero at the start.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        dropout: float = 0.0,
        use_bias: bool = True,
        shared_bias: tuple[nn.Parameter, nn.Parameter] | None = None,
    ):
        super().__init__()
        self.n_heads, self.d_head, self.dropout = n_heads, d_model // n_heads, dropout
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=use_bias)
        self.pos = nn.Linear(d_model, d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=use_bias)
        shape = (n_heads, self.d_head)
        self.bias_u, self.bias_v = shared_bias or (nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape)))

    def forward(self, x_BTD: Tensor, pos_PD: Tensor, pad_BT: Tensor) -> Tensor:
        """(B, T, D) with ``relative_positions`` (2T, D) and the padding mask (B, T), True on padding, to (B, T, D).

        Padded keys are never looked at; padded queries give finite numbers that nobody reads.
        """
        B, T, D = x_BTD.shape
        H, K = self.n_heads, self.d_head
        q_BTHK, k_BTHK, v_BTHK = self.qkv(x_BTD).view(B, T, 3, H, K).unbind(2)
        pos_HKP = self.pos(pos_PD).view(-1, H, K).permute(1, 2, 0)

        # One product a head with all items' queries as rows: positions are the same for every item, and need
        # neither be copied B times nor have B gradients summed.
        q_v = (q_BTHK + self.bias_v.to(q_BTHK.dtype)) * K**-0.5
        by_distance = torch.bmm(q_v.permute(2, 0, 1, 3).reshape(H, B * T, K), pos_HKP)
        # added, not filled in: the gradient of a sum needs no pass of its own over B x H x T x T numbers
        masked_BT = torch.zeros_like(pad_BT, dtype=by_distance.dtype).masked_fill(pad_BT, MASKED)
        bias_BHTT = shift_to_keys(by_distance.view(H, B, T, 2 * T)).transpose(0, 1) + masked_BT[:, None, None]

        q_u = q_BTHK + self.bias_u.to(q_BTHK.dtype)
        y_BHTK = F.scaled_dot_product_attention(
            q_u.transpose(1, 2),
            k_BTHK.transpose(1, 2),
            v_BTHK.transpose(1, 2),
            attn_mask=bias_BHTT,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out(y_BHTK.transpose(1, 2).reshape(B, T, D))
