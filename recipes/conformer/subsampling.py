"""Convolution subsampling: frames in time and bins in frequency halved once a stage, padding masked throughout.

Shapes: B batch, T frames in, F feature bins, t and f the same after a stage, C channels, D model size.

Source: Dong et al. 2018 (Speech-Transformer, section 3.2) for ``striding``; the depthwise-separable ``dw_striding``
is the subsampling of Fast Conformer (Rekesh et al. 2023, arXiv 2305.05084, section 2). Kernel 3, stride 2, padding 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.conformer.depthwise import float32_on_cpu
from recipes.lengths import conv_out_length, valid_mask

KERNEL, STRIDE, PADDING = 3, 2, 1
KINDS = ("striding", "dw_striding")
FACTORS = (2, 4, 8)


class ConvSubsampling(nn.Module):
    """(B, T, F) features to (B, t, D), with t = ceil(T / factor).

    Args:
        kind: ``striding`` (full convolutions) or ``dw_striding`` (after the first stage depthwise, then pointwise;
            with 144 channels at half the cost on a CPU).
        factor: 2, 4 or 8: how many frames become one.
        feat_in: F.
        channels: C. The cost of ``striding`` grows with its square: 32 to 64 are plenty on a CPU.
        d_model: D.

    Raises ValueError for another kind or factor.
    """

    def __init__(self, kind: str, factor: int, feat_in: int, channels: int, d_model: int):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"subsampling={kind!r} is not supported: use {' or '.join(map(repr, KINDS))}")
        if factor not in FACTORS:
            raise ValueError(f"subsampling_factor={factor!r} is not supported: use 2, 4 or 8")
        if channels < 1:
            raise ValueError(f"subsampling_conv_channels={channels!r}: use a positive number, or -1 for d_model")
        self.stages = factor.bit_length() - 1
        geometry = {"kernel_size": KERNEL, "stride": STRIDE, "padding": PADDING}
        self.first = nn.Conv2d(1, channels, **geometry)
        groups = channels if kind == "dw_striding" else 1
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, channels, groups=groups, **geometry) for _ in range(self.stages - 1)
        )
        self.pointwise = nn.ModuleList(
            nn.Linear(channels, channels) for _ in range(self.stages - 1 if kind == "dw_striding" else 0)
        )
        bins = feat_in
        for _ in range(self.stages):
            bins = conv_out_length(bins, KERNEL, STRIDE, PADDING)
        self.out = nn.Linear(bins * channels, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He for what a ReLU follows, unit gain for what none follows: normalised features leave with variance 1."""
        for layer in (self.first, *self.convs, *self.pointwise, self.out):
            relu = layer is not self.out and not (self.pointwise and layer in self.convs)
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu" if relu else "linear")
            nn.init.zeros_(layer.bias)

    def output_lengths(self, length):
        """Frames that come out of ``length`` frames; int or integer tensor of any shape, exact, 0 stays 0."""
        for _ in range(self.stages):
            length = conv_out_length(length, KERNEL, STRIDE, PADDING)
        return length

    def forward(self, x_BTF: Tensor, length_B: Tensor) -> Tensor:
        """(B, T, F) with lengths (B) to (B, t, D); what comes out beyond an item's length is arbitrary but finite."""
        x_BTF = x_BTF.masked_fill(~valid_mask(length_B, x_BTF.shape[1])[..., None], 0.0)
        length_B = conv_out_length(length_B, KERNEL, STRIDE, PADDING)
        x_BtfC = self._first_stage(x_BTF, length_B)
        for i, conv in enumerate(self.convs):
            # a view: channels stay last in memory, the layout in which these kernels are fast on CPU and GPU
            x_BCTF = x_BtfC.permute(0, 3, 1, 2)
            if self.pointwise:
                with float32_on_cpu(x_BCTF.device):
                    x_BCtf = conv(x_BCTF.to(conv.weight.dtype) if x_BCTF.device.type == "cpu" else x_BCTF)
                x_BtfC = F.relu(self.pointwise[i](x_BCtf.permute(0, 2, 3, 1)))
            else:
                x_BtfC = conv(x_BCTF).relu_().permute(0, 2, 3, 1)
            length_B = conv_out_length(length_B, KERNEL, STRIDE, PADDING)
            if i < len(self.convs) - 1:  # what no convolution reads needs no zeros
                x_BtfC = x_BtfC.masked_fill(~valid_mask(length_B, x_BtfC.shape[1])[..., None, None], 0.0)
        return self.out(x_BtfC.flatten(2))

    def _first_stage(self, x_BTF: Tensor, length_B: Tensor) -> Tensor:
        """Convolution and ReLU, padded frames zero: (B, T, F) to (B, t, f, C)."""
        if x_BTF.device.type != "cpu" or torch.jit.is_tracing():
            x_BtfC = F.relu(self.first(x_BTF[:, None])).permute(0, 2, 3, 1)
            return x_BtfC.masked_fill(~valid_mask(length_B, x_BtfC.shape[1])[..., None, None], 0.0).contiguous()
        # This is the largest tensor of the whole network. With one input channel, a product of 3x3 patches with a
        # row-major matrix takes a third of the time of the convolution and its backward on CPU and leaves the channels
        # last. The bias is a row of that matrix, so that patches of zeros give the zeros of the padded frames.
        patches = F.pad(x_BTF, (PADDING,) * 4).unfold(1, KERNEL, STRIDE).unfold(2, KERNEL, STRIDE).flatten(3)
        patches = F.pad(patches, (0, 1), value=1.0)
        patches = patches.masked_fill_(~valid_mask(length_B, patches.shape[1])[..., None, None], 0.0)
        weight = torch.cat((self.first.weight.flatten(1).t(), self.first.bias[None]))
        # on rows: the product of more dimensions is a view to autograd, slow to change in place
        return torch.mm(patches.flatten(0, 2), weight).relu_().view(*patches.shape[:3], -1)
