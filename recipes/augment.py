"""Augmentation of features: other tempi, other vocal tracts, then masks.

Shapes: B batch, D mel bins, T frames.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from nemo.collections.asr.modules import SpectrogramAugmentation
from nemo.core.classes.common import typecheck
from torch import Tensor

FRAMES_MULTIPLE = 16  # half of it is 2 % of a mini utterance
GPU_MULTIPLE = 32  # 8 after an encoder's 4: attention copies a bias whose rows are no multiple of 8


class WarpedSpectrogramAugmentation(SpectrogramAugmentation):
    """NeMo's SpecAugment after a warp of the frequency axis, drawn anew for each utterance.

    A longer or shorter vocal tract moves all formants together (vocal tract length perturbation, Jaitly and Hinton
    2013, ICML workshop on deep learning for audio): with few speakers in train it stands for others. There the
    frequencies are warped below the filter bank; here the mel bins are read at places that are stretched by a factor
    between 1 - ``warp`` and 1 + ``warp`` about the lowest bin, by linear interpolation, so that features that were
    computed once can be used. Bins beyond the highest repeat it. 0 leaves NeMo's SpecAugment alone.

    Raises:
        ValueError: ``warp`` below 0 or from 0.5 on.
    """

    def __init__(self, warp: float = 0.0, **masks):
        super().__init__(**masks)
        if not 0.0 <= warp < 0.5:
            raise ValueError(f"warp={warp!r}: must be at least 0 and below 0.5; 0.1 is usual")
        self.warp = warp

    @typecheck()
    @torch.no_grad()
    def forward(self, input_spec: Tensor, length: Tensor) -> Tensor:
        """Features (B, D, T) and lengths (B) in frames to features (B, D, T); in training only, as NeMo calls it."""
        if self.warp:
            factors_B = 1 + self.warp * (2 * torch.rand(len(input_spec), device=input_spec.device) - 1)
            input_spec = torch.bmm(warp_matrix(factors_B, input_spec.shape[1]).to(input_spec.dtype), input_spec)
        return super().forward(input_spec=input_spec, length=length)


def warp_matrix(factors_B: Tensor, bins: int) -> Tensor:
    """(B, D, D): row d reads bin d * factor, between its two neighbours; rows sum to 1, a factor of 1 changes nothing."""
    places_BD = (torch.arange(bins, device=factors_B.device) * factors_B[:, None]).clamp(max=bins - 1)
    distance_BDD = (places_BD[:, :, None] - torch.arange(bins, device=factors_B.device)).abs()
    return (1 - distance_BDD).clamp(min=0)


def change_tempo(features_BDT: Tensor, lengths_B: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """Features and lengths in frames, all ``factor`` times as long: slower above 1, faster below.

    Frames are read at places stretched in time, between their two neighbours: what sox calls tempo, the pitch stays
    (with a warp of the frequencies the two are about the speed perturbation of Ko et al. 2015, Interspeech). It works
    on features that were computed once. Faster speech has fewer frames for its characters: mind the frame rate.
    """
    frames = max(round(features_BDT.shape[2] * factor), 1)
    stretched = F.interpolate(features_BDT, size=frames, mode="linear", align_corners=False)
    return stretched, (lengths_B * (frames / max(features_BDT.shape[2], 1))).round().to(lengths_B.dtype)


def round_up_frames(features_BDT: Tensor, multiple: int = FRAMES_MULTIPLE) -> Tensor:
    """The same features with silence behind them up to a multiple of frames, so that batches repeat their shapes.

    Matrix products in bfloat16 are compiled for each shape on a CPU, kernels are chosen for each on a GPU.
    """
    return F.pad(features_BDT, (0, -features_BDT.shape[2] % multiple))
