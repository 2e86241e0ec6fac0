"""Depthwise convolutions, fast on a CPU too.

Shapes: B batch, T frames, C channels, K kernel size.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import Tensor


def float32_on_cpu(device: torch.device):
    """A context in which autocast leaves a CPU's depthwise convolutions in float32; elsewhere one that does nothing.

    Their kernels in bfloat16 are no faster in one dimension, and with a stride their backward takes six times as long.
    """
    if device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return torch.autocast("cpu", enabled=False)
    return contextlib.nullcontext()


def depthwise_conv(x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor | None, left: int, right: int) -> Tensor:
    """(B, T, C) to (B, T, C): each channel with its own kernel, ``left + right`` = K - 1 zeros around the time axis.

    On a CPU as an image one pixel high, whose channels may stay last: forward and backward then take 0.6 of the time
    of the convolution in one dimension at 15 taps and as long at 31. (A kernel of T frames for the gradient of the
    weights would be faster still at a fixed length, but is generated anew for each, which has taken minutes.)
    """
    if x_BTC.device.type != "cpu":
        padded_BCS = F.pad(x_BTC.transpose(1, 2), (left, right))
        return F.conv1d(padded_BCS, weight_CK[:, None].to(x_BTC.dtype), bias_C, groups=x_BTC.shape[2]).transpose(1, 2)
    with float32_on_cpu(x_BTC.device):
        x_BTC = x_BTC.to(weight_CK.dtype)
        padded_BCHS = F.pad(x_BTC, (0, 0, left, right)).transpose(1, 2)[:, :, None]
        y_BCHT = F.conv2d(padded_BCHS, weight_CK[:, None, None], bias_C, groups=x_BTC.shape[2])
    return y_BCHT.squeeze(2).transpose(1, 2)
