"""Mean and variance over the valid frames of a padded batch, for the normalisations of all encoders."""

from __future__ import annotations

from torch import Tensor


def masked_moments(x_ND: Tensor, valid_N: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of frames (N, D), N = B x T, those that are valid: (x - mean (N, D), mean (D), biased variance (D), their count ()).

    The sums are products with the mask as a row of 0 and 1: on a CPU several times faster than a reduction over the
    outer dimension, and on a GPU nothing has to be counted first, as a selection of frames would, before the next
    kernel can be launched. The count is at least 1, so that no valid frame at all gives zeros.
    """
    valid_N = valid_N.to(x_ND.dtype)
    frames = valid_N.sum().clamp(min=1.0)
    mean_D = valid_N @ x_ND / frames
    centred_ND = x_ND - mean_D
    return centred_ND, mean_D, valid_N @ centred_ND.square() / frames, frames
