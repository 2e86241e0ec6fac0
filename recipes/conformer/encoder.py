"""The Conformer encoder as a NeMo module.

Shapes: B batch, F feature bins, T frames in, t frames out, D model size.

Source: Gulati et al. 2020, "Conformer: Convolution-augmented Transformer for Speech Recognition" (arXiv 2005.08100).
Its sizes (table 1), each with the defaults for the rest and 80 feature bins:

====  ========  =======  =======  ==========
size  n_layers  d_model  n_heads  parameters
====  ========  =======  =======  ==========
S     16        144      4        8.7 M
M     16        256      4        27.3 M
L     17        512      8        115.1 M
====  ========  =======  =======  ==========

The paper counts 10.3, 30.7 and 118.8 M with the LSTM decoder of its transducer.
The paper's depthwise kernel is 32; 31, as NeMo has it, is centred on its frame.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from nemo.core.classes.common import typecheck
from nemo.core.classes.exportable import Exportable
from nemo.core.classes.mixins import AccessMixin
from nemo.core.classes.module import NeuralModule
from nemo.core.neural_types import AcousticEncodedRepresentation, LengthsType, NeuralType, SpectrogramType
from torch import Tensor, nn

from recipes.conformer.attention import RelPositionAttention, relative_positions
from recipes.conformer.convolution import NORMS, ConvolutionModule
from recipes.conformer.subsampling import ConvSubsampling
from recipes.dropout import add_branch, dropout
from recipes.intermediate import layers_to_capture, leave_captured
from recipes.lengths import valid_mask


class FeedForward(nn.Module):
    """Linear to ``expansion`` times the size, Swish, dropout, linear back (section 2.3); (B, T, D) to (B, T, D)."""

    def __init__(self, d_model: int, expansion: int, dropout: float, use_bias: bool):
        super().__init__()
        self.linear_in = nn.Linear(d_model, d_model * expansion, bias=use_bias)
        self.linear_out = nn.Linear(d_model * expansion, d_model, bias=use_bias)
        self.dropout = dropout

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.linear_out(dropout(F.silu(self.linear_in(x_BTD)), self.dropout, self.training))


class ConformerBlock(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward, LayerNorm (section 2.4)."""

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        ff_expansion_factor: int,
        kernel_size: int,
        conv_context: tuple[int, int],
        conv_norm: str,
        dropout: float,
        dropout_att: float,
        use_bias: bool,
        shared_bias: tuple[nn.Parameter, nn.Parameter] | None,
    ):
        super().__init__()
        self.dropout = dropout
        self.norm_ff1 = nn.LayerNorm(d_model)
        self.ff1 = FeedForward(d_model, ff_expansion_factor, dropout, use_bias)
        self.norm_attention = nn.LayerNorm(d_model)
        self.attention = RelPositionAttention(d_model, n_heads, dropout_att, use_bias, shared_bias)
        self.norm_conv = nn.LayerNorm(d_model)
        self.conv = ConvolutionModule(d_model, kernel_size, conv_context, conv_norm, use_bias)
        self.norm_ff2 = nn.LayerNorm(d_model)
        self.ff2 = FeedForward(d_model, ff_expansion_factor, dropout, use_bias)
        self.norm_out = nn.LayerNorm(d_model)

    def forward(self, x_BTD: Tensor, pos_PD: Tensor, pad_BT: Tensor) -> Tensor:
        """(B, T, D) with ``relative_positions`` (2T, D) and the padding mask (B, T), True on padding, to (B, T, D)."""
        x_BTD = self._add(x_BTD, self.ff1(self.norm_ff1(x_BTD)), 0.5)
        x_BTD = self._add(x_BTD, self.attention(self.norm_attention(x_BTD), pos_PD, pad_BT), 1.0)
        x_BTD = self._add(x_BTD, self.conv(self.norm_conv(x_BTD), pad_BT), 1.0)
        x_BTD = self._add(x_BTD, self.ff2(self.norm_ff2(x_BTD)), 0.5)
        return self.norm_out(x_BTD)

    def _add(self, x_BTD: Tensor, branch_BTD: Tensor, weight: float) -> Tensor:
        return add_branch(x_BTD, branch_BTD, self.dropout, self.training, weight)


class ConformerEncoder(NeuralModule, Exportable, AccessMixin):
    """Features (B, F, T) to encoded frames (B, D', t), for a CTC decoder or any other.

    What comes out for an utterance depends neither on padding nor on the other items of the batch, except that in
    training ``batch_norm`` shares its statistics (over real frames) between them.

    Arguments bear NeMo's names; where a default differs from NeMo's, it is the paper's.

    Args:
        feat_in: F, the preprocessor's ``features``.
        n_layers, d_model, n_heads: see the table above; ``d_model`` (even) is a multiple of ``n_heads``.
        feat_out: D'; -1 for ``d_model``, else a linear layer follows the last block.
        subsampling, subsampling_factor, subsampling_conv_channels: see ``ConvSubsampling``; -1: ``d_model`` channels.
        ff_expansion_factor: hidden size of the feed-forwards in multiples of ``d_model``.
        xscaling: multiply what the subsampling gives by sqrt(d_model). Off: with our initialisation it has variance 1
            already, and sixteen times larger it would drown the first block's branches. NeMo's default is on.
        untie_biases: each layer has its own u and v in the attention; else all share one pair.
        conv_kernel_size: of the depthwise convolution, odd.
        conv_norm_type: ``batch_norm`` or ``layer_norm``, see ``ConvolutionModule``.
        conv_context_size: frames [left, right] that the depthwise convolution sees, ``causal`` for all left, None for
            as many on both sides.
        use_bias: biases in all linear and convolution layers of the blocks.
        dropout: at the end of each branch and inside the feed-forwards.
        dropout_pre_encoder: on what enters the first block.
        dropout_emb: on the position embeddings.
        dropout_att: on the attention weights. Costs CPU time at each T x T weight.

    Raises ValueError, in one line, for values that do not go together.
    """

    def __init__(
        self,
        feat_in: int,
        n_layers: int,
        d_model: int,
        feat_out: int = -1,
        subsampling: str = "striding",
        subsampling_factor: int = 4,
        subsampling_conv_channels: int = -1,
        ff_expansion_factor: int = 4,
        n_heads: int = 4,
        xscaling: bool = False,
        untie_biases: bool = True,
        conv_kernel_size: int = 31,
        conv_norm_type: str = "batch_norm",
        conv_context_size: str | Iterable[int] | None = None,
        use_bias: bool = True,
        dropout: float = 0.1,
        dropout_pre_encoder: float = 0.1,
        dropout_emb: float = 0.0,
        dropout_att: float = 0.0,
    ):
        super().__init__()
        for name, value in {"feat_in": feat_in, "n_layers": n_layers, "d_model": d_model, "n_heads": n_heads}.items():
            if value < 1:
                raise ValueError(f"{name}={value!r}: use a positive number")
        if d_model % n_heads:
            raise ValueError(f"d_model={d_model} is not a multiple of n_heads={n_heads}: change one of them")
        if d_model % 2:
            raise ValueError(f"d_model={d_model} is odd: positions are pairs of sine and cosine, use an even number")
        if conv_norm_type not in NORMS:
            raise ValueError(f"conv_norm_type={conv_norm_type!r} is not supported: use {' or '.join(map(repr, NORMS))}")
        context = depthwise_context(conv_kernel_size, conv_context_size)

        channels = d_model if subsampling_conv_channels == -1 else subsampling_conv_channels
        self.subsampling = ConvSubsampling(subsampling, subsampling_factor, feat_in, channels, d_model)
        self.subsampling_factor = subsampling_factor
        self.d_model, self.n_layers = d_model, n_layers
        self.xscale = math.sqrt(d_model) if xscaling else 1.0
        self.dropout_pre_encoder, self.dropout_emb = dropout_pre_encoder, dropout_emb
        shared_bias = None
        if not untie_biases:
            shape = (n_heads, d_model // n_heads)
            shared_bias = (nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape)))
        self.layers = nn.ModuleList(
            ConformerBlock(
                d_model=d_model,
                n_heads=n_heads,
                ff_expansion_factor=ff_expansion_factor,
                kernel_size=conv_kernel_size,
                conv_context=context,
                conv_norm=conv_norm_type,
                dropout=dropout,
                dropout_att=dropout_att,
                use_bias=use_bias,
                shared_bias=shared_bias,
            )
            for _ in range(n_layers)
        )
        projected = feat_out > 0 and feat_out != d_model
        self.out_proj = nn.Linear(d_model, feat_out) if projected else None
        self._feat_in = feat_in
        self._feat_out = feat_out if projected else d_model
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Small branches on a residual stream of variance 1.

        torch's default for linear layers, uniform within 1/sqrt(fan_in), has a third of the variance that would keep
        the scale. Each branch of a block then starts well below the stream it is added to (about 0.15 of its
        variance for the four together), so that 17 blocks, each ended by a LayerNorm, still pass the first one's
        output and the last one's gradient on. Biases start at 0, u and v of the attention too; the subsampling, where
        nothing is normalised, keeps the variance at 1 (see there).
        """
        for module in self.layers.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d)) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def input_types(self):
        """``audio_signal`` (B, F, T) and ``length`` (B)."""
        return OrderedDict(
            audio_signal=NeuralType(("B", "D", "T"), SpectrogramType()), length=NeuralType(tuple("B"), LengthsType())
        )

    @property
    def output_types(self):
        """``outputs`` (B, D', t) and ``encoded_lengths`` (B)."""
        return OrderedDict(
            outputs=NeuralType(("B", "D", "T"), AcousticEncodedRepresentation()),
            encoded_lengths=NeuralType(tuple("B"), LengthsType()),
        )

    def input_example(self, max_batch: int = 1, max_dim: int = 256) -> tuple[Tensor, Tensor]:
        """Features (max_batch, F, max_dim) and full lengths, for tracing and export."""
        device = next(self.parameters()).device
        features = torch.randn(max_batch, self._feat_in, max_dim, device=device)
        return features, torch.full((max_batch,), max_dim, device=device, dtype=torch.int64)

    def output_lengths(self, length):
        """Frames that come out of ``length`` feature frames; int or integer tensor of any shape, exact, 0 stays 0."""
        return self.subsampling.output_lengths(length)

    @typecheck()
    def forward(self, audio_signal: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, F, T) and lengths (B) in frames to (B, D', t) and int64 lengths (B).

        The outputs of the blocks that NeMo's intermediate CTC asks for are left to it (recipes/intermediate.py).
        Raises ValueError where F is not ``feat_in``.
        """
        outputs, encoded_lengths, captured = self.encode(audio_signal, length, layers_to_capture(self))
        leave_captured(self, captured, encoded_lengths)
        return outputs, encoded_lengths

    def encode(
        self, x_BFT: Tensor, length_B: Tensor, capture: tuple[int, ...] = ()
    ) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
        """What ``forward`` does without NeMo's type checks: tensors only, nothing that torch.compile breaks at.

        Returns the outputs (B, D', t), their lengths (B), and those of the blocks named in ``capture`` (from 0).
        """
        if x_BFT.shape[1] != self._feat_in:
            raise ValueError(
                f"features have {x_BFT.shape[1]} bins, the encoder was built for feat_in={self._feat_in}: "
                "set the encoder's feat_in to the preprocessor's features"
            )
        if x_BFT.shape[2] == 0:  # nothing but empty utterances; the convolutions need a frame to stand on
            x_BFT = F.pad(x_BFT, (0, 1))
        length_B = length_B.to(torch.int64)
        x_BtD = self.subsampling(x_BFT.transpose(1, 2), length_B)
        length_B = self.output_lengths(length_B)
        pad_Bt = ~valid_mask(length_B, x_BtD.shape[1])
        if self.xscale != 1.0:
            x_BtD = x_BtD * self.xscale
        x_BtD = dropout(x_BtD, self.dropout_pre_encoder, self.training)
        pos_PD = relative_positions(x_BtD.shape[1], self.d_model, x_BtD.device, x_BtD.dtype)
        pos_PD = dropout(pos_PD, self.dropout_emb, self.training)
        captured = {}
        for i, layer in enumerate(self.layers):
            x_BtD = layer(x_BtD, pos_PD, pad_Bt)
            if i in capture:
                captured[i] = self._project(x_BtD)
        return self._project(x_BtD), length_B, captured

    def _project(self, x_BtD: Tensor) -> Tensor:
        return (x_BtD if self.out_proj is None else self.out_proj(x_BtD)).transpose(1, 2)


def depthwise_context(kernel_size: int, context: str | Iterable[int] | None) -> tuple[int, int]:
    """Frames left and right of its own that a depthwise kernel sees, from NeMo's ``conv_context_size``.

    Raises ValueError where the kernel is even, or where the two and the frame itself do not make the kernel.
    """
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"conv_kernel_size={kernel_size} is not odd and positive: use {max(kernel_size, 0) + 1}")
    if context is None:
        return kernel_size // 2, kernel_size // 2
    if isinstance(context, str):
        if context != "causal":
            raise ValueError(f"conv_context_size={context!r} is not supported: use 'causal', [left, right] or null")
        return kernel_size - 1, 0
    sides = tuple(context)
    if len(sides) != 2 or min(sides) < 0 or sum(sides) + 1 != kernel_size:
        raise ValueError(
            f"conv_context_size={list(sides)} does not fit conv_kernel_size={kernel_size}: "
            f"left + right must be {kernel_size - 1}"
        )
    return sides
