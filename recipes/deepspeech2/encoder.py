"""The DeepSpeech2 encoder: 2D convolutions and a stack of recurrent layers (Amodei et al. 2015, arXiv 1512.02595).

Shapes: B batch, C channels, D features (mel bins), F frequency after the convolutions, T time (frames),
H hidden units. Inside the front end tensors are (B, T, F, C) in memory, which torch calls channels_last
of (B, C, T, F): normalisation works on the last axis and the step to the recurrent layers is a view.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from nemo.core.classes.common import typecheck
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.dropout import Dropout, LockedDropout
from recipes.intermediate import layers_to_capture, leave_captured
from recipes.lengths import conv_out_length, valid_mask
from recipes.recurrent import (
    MERGES,
    NORMS,
    RNN_TYPES,
    CTCEncoder,
    RecurrentLayer,
    SequenceNorm,
    at_least,
    masked_input,
    one_of,
    share_left_out,
)


def _pairs(name: str, values, layers: int) -> list[tuple[int, int]]:
    pairs = [tuple(v) if isinstance(v, Sequence) else (v,) for v in values]
    if len(pairs) != layers or any(len(p) != 2 or min(p) < 1 for p in pairs):
        raise ValueError(f"{name}={values!r}: needs {layers} positive (frequency, time) pairs, one a conv layer")
    return pairs


class ConvLayer(nn.Module):
    """Convolution over (time, frequency), normalisation over valid frames, clipped ReLU, padding zeroed."""

    def __init__(self, c_in: int, c_out: int, kernel: tuple[int, int], stride: tuple[int, int], f_in: int, norm: str):
        super().__init__()
        (k_f, k_t), (s_f, s_t) = kernel, stride
        self.kernel_t, self.stride_t, self.norm_kind = k_t, s_t, norm
        self.f_out = conv_out_length(f_in, k_f, s_f, k_f // 2)
        self.conv = nn.Conv2d(c_in, c_out, (k_t, k_f), (s_t, s_f), (k_t // 2, k_f // 2), bias=norm == "none")
        # He et al. 2015: keeps the variance through a ReLU, whatever the kernel's size
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)
        # else torch converts the tensors to and fro at each convolution: a quarter of the front end's time on a CPU
        self.conv.to(memory_format=torch.channels_last)
        self.norm = SequenceNorm(norm, c_out * self.f_out if norm == "layer" else c_out)

    def out_length(self, length):
        return conv_out_length(length, self.kernel_t, self.stride_t, self.kernel_t // 2)

    def forward(self, x_BCTF: Tensor, mask_BT: Tensor) -> Tensor:
        """(B, C, T, F) with zeros on padding to (B, C', T', F'), likewise; mask_BT is that of the output."""
        y = self.conv(x_BCTF).permute(0, 2, 3, 1)
        B, T, F_out, C = y.shape
        if self.norm_kind == "layer":
            y = self.norm(y.reshape(B, T, F_out * C), mask_BT).reshape(B, T, F_out, C)
        else:
            y = self.norm(y, mask_BT)
        y = F.hardtanh(y, 0.0, 20.0).masked_fill(~mask_BT[:, :, None, None], 0.0)
        return y.permute(0, 3, 1, 2)


class LookAhead(nn.Module):
    """Row convolution (section 3.4 of the paper): each unit sees ``context`` future frames of itself."""

    def __init__(self, features: int, context: int):
        super().__init__()
        self.context = context
        self.conv = nn.Conv1d(features, features, context + 1, groups=features, bias=False)
        # begins as the average of the frames it sees: a random filter would mostly cancel itself out
        nn.init.constant_(self.conv.weight, 1.0 / (context + 1))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D), zero on padding, to the same shape."""
        return self.conv(F.pad(x_BTD.transpose(1, 2), (0, self.context))).transpose(1, 2)


class DeepSpeech2Encoder(CTCEncoder):
    """2D convolutions, recurrent layers with sequence-wise normalisation, optional projection.

    The defaults are of the size of the paper's GRU models (61 M parameters, 50 frames/s from 10 ms features);
    everything is an argument, see the recipe's YAML for the small variant.

    Args:
        feat_in: features per frame (mel bins).
        conv_channels: output channels of each convolution.
        conv_kernels, conv_strides: one (frequency, time) pair each; kernels odd. The product of the time
            strides is the subsampling factor.
        conv_norm: ``batch`` (over valid frames), ``layer`` (over the frequencies and channels of a frame), ``none``.
        rnn_type: ``gru``, ``lstm``, ``tanh`` or ``relu``.
        rnn_layers, rnn_hidden: how many, and units of one direction.
        bidirectional: False with ``look_ahead`` > 0 is the paper's streaming model.
        merge: directions ``sum`` (paper) or ``concat``.
        rnn_norm: normalisation of what enters each recurrent layer and leaves the last.
        residual: what enters a recurrent layer, before its normalisation, is added to what leaves it, as in AlgoPerf's
            DeepSpeech (all layers but the first, whose input is of another size).
        dropout: between layers, in training.
        locked_dropout: the same of an utterance's units are left out at all its times.
        dropout_recurrent: share of the recurrent weights left out, see ``RecurrentLayer``.
        look_ahead: future frames of the row convolution, only where ``bidirectional`` is False.
        feat_out: size of a last clipped-ReLU projection, 0 for none.

    Raises:
        ValueError: in one line, on any argument outside its valid values.
    """

    def __init__(
        self,
        feat_in: int = 80,
        conv_channels: Sequence[int] = (32, 32),
        conv_kernels: Sequence[Sequence[int]] = ((41, 11), (21, 11)),
        conv_strides: Sequence[Sequence[int]] = ((2, 2), (2, 1)),
        conv_norm: str = "batch",
        rnn_type: str = "gru",
        rnn_layers: int = 5,
        rnn_hidden: int = 1024,
        bidirectional: bool = True,
        merge: str = "sum",
        rnn_norm: str = "batch",
        residual: bool = False,
        dropout: float = 0.1,
        locked_dropout: bool = False,
        dropout_recurrent: float = 0.0,
        look_ahead: int = 0,
        feat_out: int = 0,
    ):
        super().__init__()
        one_of("conv_norm", conv_norm, NORMS)
        one_of("rnn_norm", rnn_norm, NORMS)
        one_of("rnn_type", rnn_type, RNN_TYPES)
        one_of("merge", merge, MERGES)
        at_least(1, feat_in=feat_in, rnn_layers=rnn_layers, rnn_hidden=rnn_hidden)
        at_least(0, look_ahead=look_ahead, feat_out=feat_out)
        if not conv_channels or min(conv_channels) < 1:
            raise ValueError(f"conv_channels={conv_channels!r}: needs at least one layer, each of at least one channel")
        share_left_out(dropout=dropout, dropout_recurrent=dropout_recurrent)
        if look_ahead and bidirectional:
            raise ValueError(f"look_ahead={look_ahead!r} needs bidirectional=False: no need of it otherwise")
        kernels = _pairs("conv_kernels", conv_kernels, len(conv_channels))
        strides = _pairs("conv_strides", conv_strides, len(conv_channels))
        if any(k % 2 == 0 for pair in kernels for k in pair):
            raise ValueError(f"conv_kernels={conv_kernels!r}: must be odd, to have a frame in the middle")

        self._feat_in = feat_in
        self.convs = nn.ModuleList()
        c_in, f_in, self.subsampling_factor = 1, feat_in, 1
        for c_out, kernel, stride in zip(conv_channels, kernels, strides):
            layer = ConvLayer(c_in, c_out, kernel, stride, f_in, conv_norm)
            self.convs.append(layer)
            c_in, f_in = c_out, layer.f_out
            self.subsampling_factor *= stride[1]

        size = c_in * f_in
        self.rnns, self.norms = nn.ModuleList(), nn.ModuleList()
        for i in range(rnn_layers):
            # the front end is normalised already
            self.norms.append(SequenceNorm(rnn_norm if i else "none", size))
            self.rnns.append(RecurrentLayer(
                size, rnn_hidden, rnn_type, bidirectional, merge, dropout=dropout_recurrent
            ))
            size = self.rnns[-1].output_size
        self.residual = residual
        self.look_ahead = LookAhead(size, look_ahead) if look_ahead else None
        self.out_norm = SequenceNorm(rnn_norm, size)
        self.projection = nn.Linear(size, feat_out) if feat_out else None
        self._feat_out = feat_out or size
        self.dropout = (LockedDropout if locked_dropout else Dropout)(dropout)

    def output_lengths(self, length):
        """Frames out for ``length`` feature frames in: int to int, int64 tensor to tensor."""
        for layer in self.convs:
            length = layer.out_length(length)
        return length

    @typecheck()
    def forward(self, audio_signal: Tensor, length: Tensor):
        """Features (B, D, T) with lengths (B) in frames to (outputs (B, D', T'), encoded_lengths (B)).

        The outputs of the recurrent layers that NeMo's intermediate CTC asks for are left to it, normalised
        (recipes/intermediate.py); its decoder is that of the last, so with ``feat_out`` it does not fit them.
        """
        length = length.long()
        x = masked_input(audio_signal, length).transpose(1, 2).unsqueeze(1)
        for layer in self.convs:
            length = layer.out_length(length)
            mask_BT = valid_mask(length, layer.out_length(x.shape[2]))
            x = layer(x, mask_BT)
        B, C, T, F_out = x.shape
        x = x.permute(0, 2, 3, 1).reshape(B, T, F_out * C)
        capture, captured = layers_to_capture(self), {}
        for layer, (norm, rnn) in enumerate(zip(self.norms, self.rnns)):
            normed = norm(x, mask_BT)
            if layer and layer - 1 in capture:  # the layer below, as this one is given it
                captured[layer - 1] = normed.masked_fill(~mask_BT[:, :, None], 0.0).transpose(1, 2)
            y = rnn(self.dropout(normed), length, mask_BT)
            x = x + y if self.residual and layer else y
        if self.look_ahead is not None:
            x = self.look_ahead(x)
        x = self.out_norm(x, mask_BT)
        if layer in capture:
            captured[layer] = x.masked_fill(~mask_BT[:, :, None], 0.0).transpose(1, 2)
        leave_captured(self, captured, length)
        x = self.dropout(x)
        if self.projection is not None:
            x = F.hardtanh(self.projection(x), 0.0, 20.0)
        x = x.masked_fill(~mask_BT[:, :, None], 0.0)
        return x.transpose(1, 2), length
