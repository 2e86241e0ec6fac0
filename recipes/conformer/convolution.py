"""The Conformer's convolution module, and a batch normalisation that counts real frames only.

Shapes: B batch, T frames, C channels (the model size).

Source: Gulati et al. 2020 (arXiv 2005.08100), section 2.2 and figure 2; Ioffe & Szegedy 2015 for the statistics.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.conformer.depthwise import depthwise_conv
from recipes.moments import masked_moments

NORMS = ("batch_norm", "layer_norm")


class MaskedBatchNorm(nn.Module):
    """Batch normalisation of (B, T, C) over the real frames of a padded batch.

    torch's own counts padding as frames: its statistics then follow how a batch was padded, and differ from those of
    the single utterance met later. Parameters and buffers have the names and the meaning of ``nn.BatchNorm1d``.
    The running statistics skip a batch that gave NaN or infinity, which would otherwise stay in them for good.
    """

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def forward(self, x_BTC: Tensor, pad_BT: Tensor) -> Tensor:
        """(B, T, C) with the padding mask (B, T), True on padding, to (B, T, C) of the same dtype."""
        if not self.training:
            scale = self.weight * torch.rsqrt(self.running_var + self.eps)
            shift = self.bias - self.running_mean * scale
            return torch.addcmul(shift, x_BTC, scale).to(x_BTC.dtype)
        # At least float32 whatever autocast does: sums over a hundred thousand frames.
        with torch.autocast(x_BTC.device.type, enabled=False):
            x_NC = x_BTC.flatten(0, 1).to(torch.promote_types(x_BTC.dtype, torch.float32))
            centred, mean, var, frames = masked_moments(x_NC, ~pad_BT.flatten())
            self._track(mean.detach(), (var * (frames / (frames - 1.0).clamp(min=1.0))).detach(), frames)
            y_NC = torch.addcmul(self.bias, centred, self.weight * torch.rsqrt(var + self.eps))
        return y_NC.view(x_BTC.shape).to(x_BTC.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, frames: Tensor) -> None:
        usable = torch.isfinite(mean).all() & torch.isfinite(var).all() & (frames > 1)
        for running, new in ((self.running_mean, mean), (self.running_var, var)):
            running.copy_(torch.where(usable, torch.lerp(running, new.to(running.dtype), self.momentum), running))
        self.num_batches_tracked.add_(usable)


class ConvolutionModule(nn.Module):
    """Pointwise convolution and GLU, depthwise convolution over time, normalisation, Swish, pointwise convolution.

    Args:
        channels: C.
        kernel_size: frames that the depthwise convolution sees, odd.
        context: how many of them lie left and right of the frame; the two and the frame make the kernel.
        norm: ``batch_norm`` (the paper's, masked) or ``layer_norm`` (each frame for itself: nothing is shared between
            the items of a batch, the better choice for very small batches).
        use_bias: biases in the convolutions.
    """

    def __init__(self, channels: int, kernel_size: int, context: tuple[int, int], norm: str, use_bias: bool = True):
        super().__init__()
        self.context, self.norm_name = context, norm
        self.pointwise_in = nn.Linear(channels, 2 * channels, bias=use_bias)
        self.depthwise = nn.Conv1d(channels, channels, kernel_size, groups=channels, bias=use_bias)
        self.norm = MaskedBatchNorm(channels) if norm == "batch_norm" else nn.LayerNorm(channels)
        self.pointwise_out = nn.Linear(channels, channels, bias=use_bias)

    def forward(self, x_BTC: Tensor, pad_BT: Tensor) -> Tensor:
        """(B, T, C) with the padding mask (B, T), True on padding, to (B, T, C)."""
        x_BTC = F.glu(self.pointwise_in(x_BTC), dim=-1).masked_fill(pad_BT[..., None], 0.0)
        x_BTC = depthwise_conv(x_BTC, self.depthwise.weight[:, 0], self.depthwise.bias, *self.context)
        x_BTC = self.norm(x_BTC, pad_BT) if self.norm_name == "batch_norm" else self.norm(x_BTC)
        return self.pointwise_out(F.silu(x_BTC))
