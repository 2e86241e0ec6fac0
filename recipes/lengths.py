"""Output lengths and padding masks: the only place with that arithmetic.

Every layer that shortens time answers two questions: how many frames come out of ``t`` frames, and
which frames of a padded batch are real. A recipe that answers them in two places answers them
differently sooner or later, and CTC then trains on frames that do not exist.

Shapes: B batch, T time (frames), lengths are int64 tensors of shape (B).
"""

from __future__ import annotations

import torch
from torch import Tensor


def conv_out_length(length, kernel: int, stride: int = 1, padding: int | tuple[int, int] = 0, dilation: int = 1):
    """Frames that leave a convolution (or pooling) over time.

    Works on an int and on an integer tensor of any shape. ``padding`` is what is put on each side,
    or a pair (left, right). A length of 0 stays 0, and so does whatever is too short for the kernel.
    Formula: torch.nn.Conv1d, section Shape.
    """
    left, right = (padding, padding) if isinstance(padding, int) else padding
    span = dilation * (kernel - 1) + 1
    if isinstance(length, Tensor):
        out = torch.div(length + left + right - span, stride, rounding_mode="floor") + 1
        return torch.where(length > 0, out.clamp(min=0), torch.zeros_like(length))
    return max((length + left + right - span) // stride + 1, 0) if length > 0 else 0


def valid_mask(lengths: Tensor, max_length: int) -> Tensor:
    """Boolean (B, T) mask, True on the real frames of a padded batch; T is ``max_length``."""
    return torch.arange(max_length, device=lengths.device)[None, :] < lengths[:, None]


def adjacent_repeats(targets: Tensor, target_lengths: Tensor) -> Tensor:
    """How often a target (B, S) repeats the symbol before it, (B): CTC must put a blank in between."""
    if targets.shape[1] < 2:
        return torch.zeros_like(target_lengths)
    same = targets[:, 1:] == targets[:, :-1]
    inside = valid_mask(target_lengths - 1, targets.shape[1] - 1)
    return (same & inside).sum(dim=1).to(target_lengths.dtype)


def ctc_infeasible(targets: Tensor, target_lengths: Tensor, output_lengths: Tensor) -> Tensor:
    """Boolean (B): items whose CTC loss is infinite, exactly those with T_out < S + adjacent repeats.

    Source: Graves et al. 2006, section 3: a path must visit each label, with a blank between equal
    neighbours.
    """
    return output_lengths < target_lengths + adjacent_repeats(targets, target_lengths)


def split_global_batch(global_batch_seconds: float, devices: int, accumulate: int = 1) -> float:
    """Seconds of audio in the batch of one device, so that all devices and steps make the global one.

    Raises ValueError where the numbers are not positive.
    """
    if global_batch_seconds <= 0 or devices < 1 or accumulate < 1:
        raise ValueError(
            f"global batch of {global_batch_seconds} s over {devices} devices x {accumulate} accumulated steps: "
            "all three must be positive"
        )
    return global_batch_seconds / (devices * accumulate)
