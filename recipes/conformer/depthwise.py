"""Depthwise convolution over time of (B, T, C).

Shapes: B batch, T frames, C channels, K kernel size.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor


def depthwise_conv(x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, left: int, right: int) -> Tensor:
    """(B, T, C) to (B, T, C): each channel with its own kernel, ``left + right`` = K - 1 zeros around the time axis.

    torch's own kernel, also on a CPU: one with a kernel of T frames for the gradient of the weights is faster at a
    fixed length, but is generated anew for each length, which on real batches has taken minutes. There in float32 also
    under autocast, whose bfloat16 kernel takes a quarter longer than this one with the conversion.
    """
    on_cpu = x_BTC.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", enabled=False) if on_cpu else contextlib.nullcontext():
        if on_cpu:
            x_BTC = x_BTC.to(weight_CK.dtype)
        padded_BCS = F.pad(x_BTC.transpose(1, 2), (left, right))
        y_BCT = F.conv1d(padded_BCS, weight_CK[:, None].to(x_BTC.dtype), bias_C, groups=x_BTC.shape[2])
    return y_BCT.transpose(1, 2)
