"""CTC loss that accounts for what it cannot learn from.

Every toolkit sets `zero_infinity=True` and stays silent: an utterance whose target does not fit into the
output is dropped from the gradient, still counted in the mean, and nobody is told. Here such utterances are
found exactly, left out of the mean, and named.

Shapes: B batch, T output frames, S target length, V labels (blank is index V).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.lengths import ctc_infeasible

REDUCTIONS = ("mean_volume", "mean_batch")


class CTCLoss(nn.Module):
    """Connectionist temporal classification (Graves et al. 2006), always computed in float32.

    `mean_volume` divides the summed loss by the summed target lengths: nats a character, the same whatever
    the bucket. `mean_batch` is the mean over utterances, NeMo's default. Both count feasible utterances only.
    After each call `infeasible` holds the boolean (B) of those left out.
    """

    def __init__(self, num_classes: int, reduction: str = "mean_volume"):
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f"ctc_reduction is {reduction!r}; valid: {', '.join(REDUCTIONS)}")
        self.blank = num_classes
        self.reduction = reduction
        self.infeasible: Tensor | None = None

    def per_utterance(self, log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor):
        """Losses (B) in nats, 0 where infeasible; sets `infeasible`."""
        self.infeasible = ctc_infeasible(targets, target_lengths, input_lengths)
        losses = F.ctc_loss(
            log_probs.float().transpose(0, 1),
            targets.long(),
            input_lengths.long(),
            target_lengths.long(),
            blank=self.blank,
            reduction="none",
            zero_infinity=True,  # for the gradient of infeasible utterances only; they are reported, not hidden
        )
        return losses

    def forward(self, log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor) -> Tensor:
        """Log-probs (B, T, V+1), targets (B, S), lengths (B) and (B) to a scalar loss in nats."""
        losses = self.per_utterance(log_probs, targets, input_lengths, target_lengths)
        return self.average(losses, self.infeasible, target_lengths)

    def average(self, losses: Tensor, infeasible: Tensor, target_lengths: Tensor) -> Tensor:
        """Sums of utterances (B) to the scalar that `reduction` asks for, without those that are infeasible."""
        feasible = (~infeasible).to(losses.dtype)
        count = (feasible * target_lengths if self.reduction == "mean_volume" else feasible).sum()
        return (losses * feasible).sum() / count.clamp(min=1)
