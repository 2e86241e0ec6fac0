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

from recipes.dropout import dropout

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
        q_HBTK, k_HBTK, v_HBTK = (part.permute(2, 0, 1, 3) for part in self.qkv(x_BTD).view(B, T, 3, H, K).unbind(2))
        pos_HKP = (self.pos(pos_PD) * K**-0.5).view(-1, H, K).permute(1, 2, 0)

        # One product a head with all items' queries as rows: positions are the same for every item, and need
        # neither be copied B times nor have B gradients summed.
        q_v = q_HBTK + self.bias_v.to(q_HBTK.dtype)[:, None, None]
        by_distance = torch.bmm(q_v.reshape(H, B * T, K), pos_HKP)
        bias_HBTT = shift_to_keys(by_distance.view(H, B, T, 2 * T))
        q_u = q_HBTK + self.bias_u.to(q_HBTK.dtype)[:, None, None]
        # added, not filled in: the gradient of a sum needs no pass of its own over B x H x T x T numbers
        masked_BT = torch.zeros_like(pad_BT, dtype=q_u.dtype).masked_fill(pad_BT, MASKED)
        dropout_p = self.dropout if self.training else 0.0
        if x_BTD.device.type == "cpu" and torch.is_grad_enabled() and not torch.jit.is_tracing():
            y_HBTK = _attend_on_cpu(q_u, k_HBTK, v_HBTK, bias_HBTT, masked_BT, dropout_p)
        else:
            y_HBTK = F.scaled_dot_product_attention(
                *(part.transpose(0, 1) for part in (q_u, k_HBTK, v_HBTK)),
                attn_mask=bias_HBTT.transpose(0, 1) + masked_BT[:, None, None],
                dropout_p=dropout_p,
            ).transpose(0, 1)
        return self.out(y_HBTK.permute(1, 2, 0, 3).reshape(B, T, D))


def _attend_on_cpu(q: Tensor, k: Tensor, v: Tensor, bias_HBTT: Tensor, masked_BT: Tensor, dropout_p: float) -> Tensor:
    """What ``scaled_dot_product_attention`` does, (H, B, T, K) each, for training on CPU.

    There torch has no fused kernel for a bias with a gradient, and multiplies out in float32 whatever autocast does.
    Here the products stay in autocast's type, and the bias and the mask are added inside the first of them: the mask as
    one more number of each key, which each query meets with a 1.
    """
    H, B, T, K = q.shape
    q = F.pad(q, (0, 1), value=1.0)
    k = torch.cat((k * K**-0.5, masked_BT[None, ..., None].expand(H, B, T, 1)), dim=-1)
    scores = torch.baddbmm(bias_HBTT.flatten(0, 1), q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
    weights = dropout(scores.softmax(-1), dropout_p, training=True)
    return torch.bmm(weights, v.flatten(0, 1)).view(H, B, T, K)
