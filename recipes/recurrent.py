"""Pieces shared by the two recurrent encoders: sequence-wise normalisation and masked recurrence.

Every function here keeps one promise: what comes out of a valid frame does not depend on how much
padding stands behind it, nor (batch statistics apart) on the other items of the batch.

Shapes: B batch, T time (frames), D features, H hidden units. ``mask_BT`` is True on valid frames.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from nemo.core.classes.exportable import Exportable
from nemo.core.classes.mixins import AccessMixin
from nemo.core.classes.module import NeuralModule
from nemo.core.neural_types import AcousticEncodedRepresentation, LengthsType, NeuralType, SpectrogramType
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.dropout import dropout
from recipes.lengths import valid_mask
from recipes.moments import masked_moments
from recipes.recurrent_cpu import recurrence

NORMS = ("batch", "layer", "none")
RNN_TYPES = ("gru", "lstm", "tanh", "relu")
MERGES = ("sum", "concat")


def one_of(name: str, value, valid) -> None:
    """Raise a one-line ValueError that names the argument, its value and the valid ones."""
    if value not in valid:
        raise ValueError(f"{name}={value!r} is not known, use one of: {', '.join(map(str, valid))}")


def at_least(low: int, **values: int) -> None:
    """Raise a one-line ValueError that names the first argument below ``low``."""
    for name, value in values.items():
        if value < low:
            raise ValueError(f"{name}={value!r}: must be at least {low}")


def share_left_out(**values: float) -> None:
    """Raise a one-line ValueError that names the first argument that is no share to leave out: below 0, or 1 and above."""
    for name, value in values.items():
        if not 0.0 <= value < 1.0:
            raise ValueError(f"{name}={value!r}: must be at least 0 and below 1")


class CTCEncoder(NeuralModule, Exportable, AccessMixin):
    """What NeMo asks of an encoder: neural types, an example input. Subclasses set ``_feat_in`` and ``_feat_out``."""

    @property
    def input_types(self):
        return OrderedDict(
            audio_signal=NeuralType(("B", "D", "T"), SpectrogramType()),
            length=NeuralType(tuple("B"), LengthsType()),
        )

    @property
    def output_types(self):
        return OrderedDict(
            outputs=NeuralType(("B", "D", "T"), AcousticEncodedRepresentation()),
            encoded_lengths=NeuralType(tuple("B"), LengthsType()),
        )

    def input_example(self, max_batch: int = 1, max_dim: int = 256):
        """A batch for export: (features (B, D, T), lengths (B))."""
        device = next(self.parameters()).device
        return (
            torch.randn(max_batch, self._feat_in, max_dim, device=device),
            torch.full((max_batch,), max_dim, dtype=torch.int64, device=device),
        )


class SequenceBatchNorm(nn.Module):
    """Batch normalisation over the valid frames of a padded batch (Amodei et al. 2015, section 3.2).

    Normalises the last axis of (B, T, ..., D). Statistics are those of the valid frames alone, in float32,
    and so are the running ones used in evaluation. A batch with fewer than two values per feature
    has no variance: it is normalised with the running statistics and leaves them alone. Under DDP each
    device uses its own frames (no synchronisation), and the running statistics saved are those of rank 0.
    """

    def __init__(self, features: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: Tensor, mask_BT: Tensor) -> Tensor:
        """x (B, T, ..., D) to the same shape; the values on padding frames are finite but mean nothing."""
        if self.training and x.device.type != "cpu":
            return self._by_sums(x, mask_BT)
        D = x.shape[-1]
        frames = x[mask_BT].reshape(-1, D) if self.training else x.reshape(-1, D)
        of_batch = self.training and frames.shape[0] > 1
        y = F.batch_norm(
            frames, self.running_mean, self.running_var, self.weight, self.bias, of_batch, self.momentum, self.eps
        )
        if not self.training:
            return y.reshape(x.shape)
        out = torch.zeros(x.shape, dtype=y.dtype, device=x.device)
        out[mask_BT] = y.reshape(-1, *x.shape[2:])
        return out

    def _by_sums(self, x: Tensor, mask_BT: Tensor) -> Tensor:
        """The same in training without picking frames out, for which a GPU would have to be waited for."""
        with torch.autocast(x.device.type, enabled=False):
            mask = mask_BT.reshape(*mask_BT.shape, *[1] * (x.ndim - 3)).expand(x.shape[:-1])
            x_ND = x.masked_fill(~mask[..., None], 0.0).reshape(-1, x.shape[-1]).float()
            centred, mean, var, count = masked_moments(x_ND, mask.reshape(-1))
            enough = count > 1
            with torch.no_grad():
                unbiased = var * count / (count - 1).clamp(min=1)
                for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
                    running.copy_(torch.where(enough, torch.lerp(running, new, self.momentum), running))
            centred = torch.where(enough, centred, x_ND - self.running_mean)
            scale = self.weight * torch.rsqrt(torch.where(enough, var, self.running_var) + self.eps)
            return torch.addcmul(self.bias, centred, scale).reshape(x.shape)


class SequenceNorm(nn.Module):
    """``batch``, ``layer`` or ``none`` over the last axis, behind one signature."""

    def __init__(self, kind: str, features: int):
        super().__init__()
        one_of("norm", kind, NORMS)
        self.kind = kind
        self.norm = {
            "batch": lambda: SequenceBatchNorm(features),
            "layer": lambda: nn.LayerNorm(features),
            "none": nn.Identity,
        }[kind]()

    def forward(self, x: Tensor, mask_BT: Tensor) -> Tensor:
        return self.norm(x, mask_BT) if self.kind == "batch" else self.norm(x)


def masked_input(audio_signal: Tensor, length: Tensor) -> Tensor:
    """Features (B, D, T) with zeros on padding frames; at least one frame, so that a batch of nothing passes."""
    if not torch.jit.is_tracing() and audio_signal.shape[-1] == 0:
        audio_signal = F.pad(audio_signal, (0, 1))
    return audio_signal.masked_fill(~valid_mask(length, audio_signal.shape[-1])[:, None, :], 0.0)


def reverse_index(lengths: Tensor, max_length: int) -> Tensor:
    """(B, T) index that reverses each item within its own length and leaves its padding in place."""
    t = torch.arange(max_length, device=lengths.device)[None, :]
    return torch.where(t < lengths[:, None], lengths[:, None] - 1 - t, t)


class RecurrentLayer(nn.Module):
    """One recurrent layer over padded batches, in one or both directions.

    The second direction starts on the last valid frame of each item, so padding never enters the state: on
    CUDA and in an export each item is reversed within its own length, run forward, and reversed back; on a
    CPU both directions run in one loop of our own (recurrent_cpu.py says why), with the same results. Packed
    sequences were twice to four times as slow as either on a CPU.

    Args:
        input_size, hidden_size: features in, and units of one direction.
        rnn_type: ``gru``, ``lstm``, ``tanh`` or ``relu`` (the last is the recurrence of the DeepSpeech paper).
        bidirectional: both directions.
        merge: ``sum`` of the directions (both papers) or ``concat``.
        init: ``stable`` (see ``_initialise``) or ``torch`` (torch's own uniform one).
        dropout: share of the recurrent weights that is left out in training, anew for each batch (DropConnect, as
            Merity et al. 2017, arXiv 1708.02182).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        rnn_type: str = "gru",
        bidirectional: bool = True,
        merge: str = "sum",
        init: str = "stable",
        dropout: float = 0.0,
    ):
        super().__init__()
        one_of("rnn_type", rnn_type, RNN_TYPES)
        one_of("merge", merge, MERGES)
        self.dropout = dropout
        self.rnn_type, self.bidirectional, self.merge = rnn_type, bidirectional, merge
        self.output_size = hidden_size * (2 if bidirectional and merge == "concat" else 1)

        def direction() -> nn.RNNBase:
            if rnn_type in ("gru", "lstm"):
                rnn = {"gru": nn.GRU, "lstm": nn.LSTM}[rnn_type](input_size, hidden_size, batch_first=True)
            else:
                rnn = nn.RNN(input_size, hidden_size, nonlinearity=rnn_type, batch_first=True)
            if init == "stable":
                _initialise(rnn, rnn_type, hidden_size)
            return rnn

        self.ahead = direction()
        self.back = direction() if bidirectional else None

    def forward(self, x_BTD: Tensor, lengths_B: Tensor, mask_BT: Tensor) -> Tensor:
        """(B, T, D) to (B, T, output_size), zero on padding frames."""
        directions = [self.ahead] + ([self.back] if self.back is not None else [])
        # torch trains an LSTM in float32 by oneDNN's fused kernels, in 0.6 of the time of our loop; nothing else
        fused = self.rnn_type == "lstm" and not torch.is_autocast_enabled("cpu")
        traced = torch.jit.is_tracing() or torch.compiler.is_compiling()
        if x_BTD.device.type == "cpu" and not fused and not traced:
            ys = recurrence(self.rnn_type, x_BTD, mask_BT, [self._weights(rnn) for rnn in directions])
        elif x_BTD.is_cuda:
            # Autocast's recurrence is in float16 even where bfloat16 was asked for, and nothing scales the loss for it.
            with torch.autocast("cuda", enabled=False):
                ys = self._torch_recurrence(x_BTD.float(), lengths_B)
        else:
            ys = self._torch_recurrence(x_BTD, lengths_B)
        y = ys[0] if len(ys) == 1 else ys[0] + ys[1] if self.merge == "sum" else torch.cat(ys, dim=-1)
        return y.masked_fill(~mask_BT[:, :, None], 0.0)

    def _torch_recurrence(self, x_BTD: Tensor, lengths_B: Tensor) -> list[Tensor]:
        """The same by torch's own layers: for CUDA (one cuDNN call a direction) and for export."""
        ys = [self._states(self.ahead, x_BTD)]
        if self.back is not None:
            B, T, _ = x_BTD.shape
            rows = (reverse_index(lengths_B, T) + torch.arange(B, device=x_BTD.device)[:, None] * T).reshape(-1)

            def reverse(z: Tensor) -> Tensor:
                return z.reshape(B * T, -1).index_select(0, rows).reshape(B, T, -1)

            ys.append(reverse(self._states(self.back, reverse(x_BTD))))
        return ys

    def _weights(self, rnn: nn.RNNBase) -> tuple[Tensor, ...]:
        w_hh = dropout(rnn.weight_hh_l0, self.dropout, self.training)
        return rnn.weight_ih_l0, w_hh, rnn.bias_ih_l0, rnn.bias_hh_l0

    def _states(self, rnn: nn.RNNBase, x_BTD: Tensor) -> Tensor:
        if not self.training or self.dropout == 0.0:
            return rnn(x_BTD)[0]
        # as the layer's own forward calls it, with other recurrent weights
        run = getattr(torch._VF, self.rnn_type if self.rnn_type in ("gru", "lstm") else f"rnn_{self.rnn_type}")
        zeros = x_BTD.new_zeros(1, x_BTD.shape[0], rnn.hidden_size)
        start = (zeros, zeros) if self.rnn_type == "lstm" else zeros
        return run(x_BTD, start, list(self._weights(rnn)), True, 1, 0.0, True, False, True)[0]


@torch.no_grad()
def _initialise(rnn: nn.RNNBase, rnn_type: str, hidden: int) -> None:
    """Input weights Glorot, recurrent weights orthogonal per gate, biases zero.

    An orthogonal matrix keeps the length of the state, so gradients neither vanish nor explode over the
    hundreds of steps of an utterance at the start. The relu recurrence has nothing that bounds it: its
    matrix begins as half an orthogonal one. The forget gate of an LSTM begins open (bias 1, Jozefowicz
    et al. 2015), else it forgets within two frames.
    """
    for gate in rnn.weight_hh_l0.split(hidden):
        nn.init.orthogonal_(gate, gain=0.5 if rnn_type == "relu" else 1.0)
    for gate in rnn.weight_ih_l0.split(hidden):
        nn.init.xavier_uniform_(gate)
    rnn.bias_ih_l0.zero_()
    rnn.bias_hh_l0.zero_()
    if rnn_type == "lstm":
        rnn.bias_ih_l0[hidden : 2 * hidden] = 1.0
