"""Encoders as people write them for NeMo, in small and right: what the faults change a line of.

They are written apart from the project's own encoders, with torch's modules, so that the doctor meets other hands.
Shapes: B batch, D features, T frames.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from nemo.core.classes.common import ALLOWED_TARGET_PREFIXES, typecheck
from nemo.core.classes.exportable import Exportable
from nemo.core.classes.module import NeuralModule
from nemo.core.neural_types import AcousticEncodedRepresentation, LengthsType, NeuralType, SpectrogramType
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

if "tests." not in ALLOWED_TARGET_PREFIXES:  # NeMo builds no class by name from anywhere else
    ALLOWED_TARGET_PREFIXES.append("tests.")


def mask(length, frames: int):
    """True on real frames, (B, T)."""
    return torch.arange(frames, device=length.device)[None, :] < length[:, None]


class Encoder(NeuralModule, Exportable):
    """NeMo's side of an encoder; subclasses set `_feat_in` and `_feat_out` and write `encode`."""

    @property
    def input_types(self):
        return OrderedDict(
            audio_signal=NeuralType(("B", "D", "T"), SpectrogramType()), length=NeuralType(tuple("B"), LengthsType())
        )

    @property
    def output_types(self):
        return OrderedDict(
            outputs=NeuralType(("B", "D", "T"), AcousticEncodedRepresentation()),
            encoded_lengths=NeuralType(tuple("B"), LengthsType()),
        )

    def input_example(self, max_batch=1, max_dim=256):
        return torch.randn(max_batch, self._feat_in, max_dim), torch.full((max_batch,), max_dim)

    @typecheck()
    def forward(self, audio_signal, length):
        return self.encode(audio_signal, length.long())


class SpeechRNN(Encoder):
    """DeepSpeech2 in small: two strided convolutions with LayerNorm, a bidirectional GRU, a projection.

    The convolutions see 50 ms, half a letter of the tone speech: to know it, the recurrence is needed.
    """

    def __init__(self, feat_in: int, hidden: int = 48, layers: int = 1, dropout: float = 0.0, strides=(2, 2)):
        super().__init__()
        self._feat_in, self._feat_out, self.hidden, self.strides = feat_in, hidden, hidden, tuple(strides)
        self.conv1 = nn.Conv1d(feat_in, hidden, 3, strides[0], 1)
        self.conv2 = nn.Conv1d(hidden, hidden, 1, strides[1])
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.rnn = nn.GRU(hidden, hidden, layers, batch_first=True, bidirectional=True)
        self.out = nn.Linear(2 * hidden, hidden)
        self.norm3 = nn.LayerNorm(hidden)
        self.dropout = nn.Dropout(dropout)

    def lengths(self, length):
        for stride in self.strides:
            length = torch.div(length - 1, stride, rounding_mode="floor") + 1
        return length

    def convolve(self, x, length):
        """(B, D, T) to (B, T', H), zero on padding."""
        for conv, norm, stride in zip((self.conv1, self.conv2), (self.norm1, self.norm2), self.strides):
            x = x * mask(length, x.shape[2])[:, None, :]
            length = torch.div(length - 1, stride, rounding_mode="floor") + 1
            x = torch.relu(norm(conv(x).transpose(1, 2))).transpose(1, 2)
        return self.dropout(x.transpose(1, 2))

    def recur(self, x, length):
        """(B, T', H) to (B, T', 2 H)."""
        packed = pack_padded_sequence(x, length.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.shape[1])[0]

    def project(self, x):
        return torch.relu(self.norm3(self.out(x)))

    def encode(self, x, length):
        x = self.convolve(x, length)
        length = self.lengths(length)
        x = self.project(self.recur(x, length))
        return (x * mask(length, x.shape[1])[:, :, None]).transpose(1, 2), length


class SpeechTransformer(Encoder):
    """Stacked frames, learned-free positions by a convolution, torch's transformer layers with a padding mask."""

    def __init__(self, feat_in: int, hidden: int = 48, layers: int = 2, heads: int = 4, dropout: float = 0.0,
                 stack: int = 2, batch_first: bool = True):
        super().__init__()
        self._feat_in, self._feat_out, self.stack = feat_in, hidden, stack
        self.inp = nn.Linear(feat_in * stack, hidden)
        self.positions = nn.Conv1d(hidden, hidden, 9, padding=4, groups=hidden)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(hidden, heads, 4 * hidden, dropout, batch_first=batch_first, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(hidden)

    def stacked(self, x):
        """(B, D, T) to (B, T / stack, stack * D), neighbouring frames side by side."""
        B, D, T = x.shape
        x = nn.functional.pad(x, (0, -T % self.stack)).transpose(1, 2)
        return x.reshape(B, x.shape[1] // self.stack, self.stack * D)

    def attend(self, layer, x, padding):
        return layer(x, src_key_padding_mask=padding)

    def encode(self, x, length):
        x = self.inp(self.stacked(x * mask(length, x.shape[2])[:, None, :]))
        length = torch.div(length + self.stack - 1, self.stack, rounding_mode="floor")
        valid = mask(length, x.shape[1])
        x = x * valid[:, :, None]
        x = x + self.positions(x.transpose(1, 2)).transpose(1, 2)
        for layer in self.layers:
            x = self.attend(layer, x, ~valid)
        return (self.norm(x) * valid[:, :, None]).transpose(1, 2), length


class SpeechConv(Encoder):
    """Jasper in small: convolutions with BatchNorm over real frames, ReLU and residuals."""

    def __init__(self, feat_in: int, hidden: int = 48, layers: int = 4, stride: int = 2, dropout: float = 0.0):
        super().__init__()
        self._feat_in, self._feat_out, self.stride = feat_in, hidden, stride
        self.first = nn.Conv1d(feat_in, hidden, 9, stride, 4)
        self.convs = nn.ModuleList(nn.Conv1d(hidden, hidden, 9, padding=4) for _ in range(layers))
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in range(layers + 1))
        self.dropout = nn.Dropout(dropout)

    def normalise(self, norm, x, valid):
        """(B, D, T) by the statistics of its real frames."""
        y = torch.zeros_like(x).transpose(1, 2)
        y[valid] = norm(x.transpose(1, 2)[valid])
        return y.transpose(1, 2)

    def encode(self, x, length):
        x = self.first(x * mask(length, x.shape[2])[:, None, :])
        length = torch.div(length - 1, self.stride, rounding_mode="floor") + 1
        valid = mask(length, x.shape[2])
        x = torch.relu(self.normalise(self.norms[0], x, valid))
        for conv, norm in zip(self.convs, self.norms[1:]):
            x = x + self.dropout(torch.relu(self.normalise(norm, conv(x), valid)))
        return x, length
