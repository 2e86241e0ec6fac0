"""The DeepSpeech encoder: dense layers over a context window and one recurrent layer (Hannun et al. 2014,
arXiv 1412.5567, section 2).

Shapes: B batch, D features (mel bins), T time (frames), H hidden units.
"""

from __future__ import annotations

import torch
from nemo.core.classes.common import typecheck
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.dropout import Dropout
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

INITS = ("stable", "torch")

# torchaudio.models.DeepSpeech as arguments of the encoder below (add feat_in, hidden, dropout). Its last
# Linear and log_softmax are NeMo's decoder. It has no context, no normalisation, no lengths, and a
# recurrence that nothing bounds: kept because it is the one that was seen to give NaN, not to be trained.
TORCHAUDIO = dict(
    context=0, stride=1, norm="none", rnn_norm="none", rnn_type="relu", merge="sum", use_lengths=False, init="torch"
)


class DenseLayer(nn.Module):
    """Linear over a window of frames, normalisation over valid frames, clipped ReLU, dropout."""

    def __init__(self, d_in: int, d_out: int, norm: str, dropout: float, clip: float, init: str, window=1, stride=1):
        super().__init__()
        self.clip = clip
        # a window of several frames is a convolution over time: same arithmetic, no unfolded copy
        self.linear = nn.Conv1d(d_in, d_out, window, stride, window // 2, bias=norm == "none" or init == "torch")
        if init == "stable":
            # He et al. 2015: keeps the variance through a ReLU
            nn.init.kaiming_normal_(self.linear.weight, nonlinearity="relu")
            if self.linear.bias is not None:
                nn.init.zeros_(self.linear.bias)
        self.norm = SequenceNorm(norm, d_out)
        self.dropout = Dropout(dropout)

    def forward(self, x_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """(B, T, D) to (B, T', D'); mask_BT is that of the output."""
        if self.linear.kernel_size[0] == 1 and self.linear.stride[0] == 1:
            y = F.linear(x_BTD, self.linear.weight[:, :, 0], self.linear.bias)
        else:
            y = self.linear(x_BTD.transpose(1, 2)).transpose(1, 2)
        return self.dropout(F.hardtanh(self.norm(y, mask_BT), 0.0, self.clip))


class DeepSpeechEncoder(CTCEncoder):
    """Context window, three clipped-ReLU layers, one bidirectional recurrent layer, one more dense layer.

    The defaults train: normalised layers and a recurrence that is bounded. The paper's own network is
    ``norm=none, rnn_norm=none, rnn_type=relu, stride=2``; torchaudio's is the dictionary ``TORCHAUDIO``.

    Args:
        feat_in: features per frame (mel bins).
        hidden: units of the dense layers (paper: 2048).
        rnn_hidden: units of one direction of the recurrent layer, None for ``hidden``.
        context: frames seen on each side of a frame (paper: 5 to 9).
        stride: frames from one window to the next, the subsampling factor (paper: 2).
        norm: of the dense layers before their ReLU: ``batch`` (over valid frames), ``layer``, ``none`` (paper).
        rnn_type: ``lstm``, ``gru``, ``tanh`` or ``relu`` (paper).
        rnn_norm: of the recurrent layer's output: ``batch``, ``layer``, ``none``.
        merge: directions ``sum`` (paper) or ``concat``.
        dropout: after each dense layer, in training (paper: 0.05 to 0.10).
        clip: upper bound of the ReLU (paper: 20).
        use_lengths: False lets padding into the windows and the recurrence, as torchaudio does.
        init: ``stable`` or ``torch`` (torch's defaults, as torchaudio has them).

    Raises:
        ValueError: in one line, on any argument outside its valid values.
    """

    def __init__(
        self,
        feat_in: int = 80,
        hidden: int = 2048,
        rnn_hidden: int | None = None,
        context: int = 9,
        stride: int = 2,
        norm: str = "batch",
        rnn_type: str = "lstm",
        rnn_norm: str = "batch",
        merge: str = "sum",
        dropout: float = 0.1,
        clip: float = 20.0,
        use_lengths: bool = True,
        init: str = "stable",
    ):
        super().__init__()
        rnn_hidden = hidden if rnn_hidden is None else rnn_hidden
        one_of("norm", norm, NORMS)
        one_of("rnn_norm", rnn_norm, NORMS)
        one_of("rnn_type", rnn_type, RNN_TYPES)
        one_of("merge", merge, MERGES)
        one_of("init", init, INITS)
        at_least(1, feat_in=feat_in, hidden=hidden, rnn_hidden=rnn_hidden, stride=stride)
        at_least(0, context=context)
        share_left_out(dropout=dropout)
        if not clip > 0:
            raise ValueError(f"clip={clip!r}: must be above 0")

        self._feat_in, self._feat_out = feat_in, hidden
        self.context, self.use_lengths, self.subsampling_factor = context, use_lengths, stride
        shared = (norm, dropout, clip, init)
        self.dense = nn.ModuleList(
            [
                DenseLayer(feat_in, hidden, *shared, window=2 * context + 1, stride=stride),
                DenseLayer(hidden, hidden, *shared),
                DenseLayer(hidden, hidden, *shared),
            ]
        )
        self.rnn = RecurrentLayer(hidden, rnn_hidden, rnn_type, True, merge, init)
        self.rnn_norm = SequenceNorm(rnn_norm, self.rnn.output_size)
        self.last = DenseLayer(self.rnn.output_size, hidden, *shared)

    def output_lengths(self, length):
        """Frames out for ``length`` feature frames in: int to int, int64 tensor to tensor."""
        return conv_out_length(length, 2 * self.context + 1, self.subsampling_factor, self.context)

    @typecheck()
    def forward(self, audio_signal: Tensor, length: Tensor):
        """Features (B, D, T) with lengths (B) in frames to (outputs (B, D', T'), encoded_lengths (B))."""
        length = length.long()
        used = length if self.use_lengths else torch.zeros_like(length) + audio_signal.shape[-1]
        x = masked_input(audio_signal, used).transpose(1, 2)
        length, used = self.output_lengths(length), self.output_lengths(used)
        mask_BT = valid_mask(used, self.output_lengths(x.shape[1]))
        for layer in self.dense:
            x = layer(x, mask_BT)
        x = self.rnn_norm(self.rnn(x, used, mask_BT), mask_BT)
        x = self.last(x, mask_BT).masked_fill(~mask_BT[:, :, None], 0.0)
        return x.transpose(1, 2), length
