"""DeepSpeech2 as it is usually written: packed sequences, batch normalisation over all frames of the padded batch.

The reference that our encoder is measured against: `nn.Conv2d`, `nn.BatchNorm2d`, and for each recurrent layer
`pack_padded_sequence`, one bidirectional `nn.GRU`, `pad_packed_sequence`, the two directions summed. Settings and
weights are taken from our encoder, so that without dropout and in evaluation both give the same.

Shapes: B batch, C channels, F frequency, T time, D features, H hidden units.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from recipes.deepspeech2.encoder import DeepSpeech2Encoder
from recipes.lengths import valid_mask
from tools.bench._common import BenchError

DIRECTIONS = {"ahead": "", "back": "_reverse"}  # of our layer; the ending that nn.GRU gives its parameters


class FrameNorm(nn.Module):
    """Batch or layer normalisation of (T, B, D), each frame of the padded batch a row."""

    def __init__(self, kind: str, size: int):
        super().__init__()
        self.norm = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "none": nn.Identity}[kind](size)

    def forward(self, x_TBD: Tensor) -> Tensor:
        return self.norm(x_TBD.flatten(0, 1)).view_as(x_TBD)


class PackedDeepSpeech2(nn.Module):
    """The network of one of our encoders (bidirectional GRU, directions summed), with its weights.

    Raises BenchError for an encoder with parts that are not rebuilt here.
    """

    def __init__(self, ours: DeepSpeech2Encoder):
        super().__init__()
        if any(r.back is None or r.merge != "sum" or r.rnn_type != "gru" for r in ours.rnns) or ours.projection:
            raise BenchError("only bidirectional GRU layers, directions summed, without projection, are rebuilt packed")
        if any(layer.norm_kind != "batch" for layer in ours.convs):
            raise BenchError("only convolutions with batch normalisation are rebuilt: model.encoder.conv_norm=batch")
        self.convs, self.conv_norms = nn.ModuleList(), nn.ModuleList()
        for layer in ours.convs:
            conv = layer.conv
            self.convs.append(nn.Conv2d(
                conv.in_channels, conv.out_channels, conv.kernel_size[::-1], conv.stride[::-1], conv.padding[::-1],
                bias=False,
            ))
            self.conv_norms.append(nn.BatchNorm2d(conv.out_channels))
        self.rnns = nn.ModuleList(
            nn.GRU(rnn.ahead.input_size, rnn.ahead.hidden_size, bidirectional=True) for rnn in ours.rnns
        )
        kinds = [norm.kind for norm in (*ours.norms, ours.out_norm)]
        sizes = [rnn.input_size for rnn in self.rnns] + [ours.rnns[-1].output_size]
        self.norms = nn.ModuleList(FrameNorm(kind, size) for kind, size in zip(kinds, sizes))
        self.dropout, self.residual = nn.Dropout(ours.dropout.p), ours.residual
        self._layer_lengths = [layer.out_length for layer in ours.convs]
        self.load_state_dict(packed_state_dict(ours, ours.state_dict()), strict=False)  # no count of batches in ours

    def forward(self, audio_signal: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, D, T) with lengths (B) to (outputs (B, H, T'), lengths (B))."""
        x_BCFT, length_B = audio_signal[:, None], length
        for conv, norm, out_length in zip(self.convs, self.conv_norms, self._layer_lengths):
            length_B = out_length(length_B)
            x_BCFT = F.hardtanh(norm(conv(x_BCFT)), 0.0, 20.0)
            x_BCFT = x_BCFT.masked_fill(~valid_mask(length_B, x_BCFT.shape[3])[:, None, None], 0.0)
        T = x_BCFT.shape[3]
        x_TBD = x_BCFT.flatten(1, 2).permute(2, 0, 1).contiguous()
        lengths = length_B.cpu()
        for layer, (norm, rnn) in enumerate(zip(self.norms, self.rnns)):
            packed = pack_padded_sequence(self.dropout(norm(x_TBD)), lengths, enforce_sorted=False)
            y_TBD, _ = pad_packed_sequence(rnn(packed)[0], total_length=T)
            y_TBD = y_TBD.unflatten(2, (2, -1)).sum(2)
            x_TBD = x_TBD + y_TBD if self.residual and layer else y_TBD
        x_TBD = self.dropout(self.norms[-1](x_TBD))
        return x_TBD.permute(1, 2, 0), length_B


def packed_state_dict(ours: DeepSpeech2Encoder, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of our encoder (its state, or its gradients) under the names and in the order of the other.

    Ours convolves (time, frequency) and flattens frequency before channels, the other the reverse of both.
    """
    theirs: dict[str, Tensor] = {}
    channels, bins = ours.convs[-1].conv.out_channels, ours.convs[-1].f_out
    for name, value in state.items():
        part, index, inside = name.split(".", 2) if name.startswith(("convs.", "rnns.", "norms.")) else (name, "", "")
        if part == "convs" and inside == "conv.weight":
            theirs[f"convs.{index}.weight"] = value.transpose(2, 3)
        elif part == "convs":
            theirs[f"conv_norms.{index}.{inside.removeprefix('norm.norm.')}"] = value
        elif part == "rnns":
            direction, kind = inside.split(".")
            if index == "0" and kind.startswith("weight_ih"):
                value = value.unflatten(1, (bins, channels)).transpose(1, 2).flatten(1)
            theirs[f"rnns.{index}.{kind}{DIRECTIONS[direction]}"] = value
        elif part == "norms":
            theirs[f"norms.{index}.{inside}"] = value
        elif name.startswith("out_norm."):
            theirs[f"norms.{len(ours.norms)}.{name.removeprefix('out_norm.')}"] = value
        else:
            raise BenchError(f"{name} of our encoder has no counterpart in the packed one")
    return theirs
