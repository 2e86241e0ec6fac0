"""Hears every CTC loss that a run computes, whoever computes it, and measures what the model's frames say.

torch.nn.CTCLoss, NeMo's CTCLoss and ours all end in torch.nn.functional.ctc_loss: there the log-probs, targets,
lengths and the blank that are really used can be seen, for any LightningModule, without a hook in the model.

Shapes: T frames, B batch, S targets, V labels with the blank.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from recipes.lengths import adjacent_repeats, valid_mask

log = logging.getLogger("doctor")


@dataclass
class Call:
    """One CTC loss: log_probs (T, B, V), targets (B, S) or (all), lengths (B), the result as returned, detached."""

    log_probs: Tensor
    targets: Tensor
    input_lengths: Tensor
    target_lengths: Tensor
    blank: int
    reduction: str
    zero_infinity: bool
    result: Tensor

    def per_label(self) -> Tensor:
        """The loss in nats a target label, whatever the reduction; a scalar tensor."""
        if self.reduction == "none":
            return self.result.sum() / self.target_lengths.sum().clamp(min=1)
        if self.reduction == "sum":
            return self.result / self.target_lengths.sum().clamp(min=1)
        return self.result

    def finite(self) -> Tensor:
        """Boolean scalar tensor."""
        return torch.isfinite(self.result).all()

    def padded_targets(self) -> Tensor:
        """Targets (B, S), also where they were given in one row."""
        if self.targets.dim() == 2:
            return self.targets
        rows = torch.split(self.targets, self.target_lengths.tolist())
        return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)

    def part(self, most: int = 4_000_000) -> Call:
        """The first utterances only, so that log_probs has at most so many values: a look must not need memory."""
        frames, batch, labels = self.log_probs.shape
        keep = max(min(most // max(frames * labels, 1), batch), 1)
        if keep == batch:
            return self
        return replace(self, log_probs=self.log_probs[:, :keep], targets=self.padded_targets()[:keep],
                       input_lengths=self.input_lengths[:keep], target_lengths=self.target_lengths[:keep])

    def room(self) -> tuple[Tensor, Tensor]:
        """Frames needed and frames there, (B) each: below, the loss is infinite."""
        need = self.target_lengths + adjacent_repeats(self.padded_targets(), self.target_lengths)
        return need, self.input_lengths


class CTCListener:
    """Between `open` and `close` keeps the first CTC loss since `clear` (later ones belong to inner layers)."""

    def __init__(self):
        self.call: Call | None = None
        self.active = False
        self._original = None

    def open(self) -> None:
        if self._original is not None:
            self.active = True
            return
        original = self._original = functional.ctc_loss

        def ctc_loss(log_probs, targets, input_lengths, target_lengths, blank=0, reduction="mean", zero_infinity=False):
            result = original(log_probs, targets, input_lengths, target_lengths, blank, reduction, zero_infinity)
            if self.active and self.call is None:
                try:
                    self._keep(log_probs, targets, input_lengths, target_lengths, blank, reduction, zero_infinity,
                        result)
                except Exception as error:  # in the middle of somebody's forward pass
                    log.warning(f"the doctor could not keep a CTC loss to look at: {error}")
            return result

        self._wrapper = ctc_loss
        functional.ctc_loss = ctc_loss
        self.active = True

    def close(self) -> None:
        """Puts torch's own function back, unless somebody else has replaced ours meanwhile."""
        self.active = False
        self.call = None
        if self._original is not None and functional.ctc_loss is self._wrapper:
            functional.ctc_loss = self._original
            self._original = None

    def clear(self) -> None:
        self.call = None

    def _keep(self, log_probs, targets, input_lengths, target_lengths, blank, reduction, zero_infinity, result) -> None:
        if log_probs.dim() == 2:  # one utterance without a batch axis
            log_probs, targets = log_probs.detach()[:, None], targets.reshape(1, -1)
        device = log_probs.device
        lengths = [torch.as_tensor(x, device=device).reshape(-1).long() for x in (input_lengths, target_lengths)]
        targets = targets.detach().to(device).long()
        self.call = Call(log_probs.detach(), targets, *lengths, int(blank), reduction, bool(zero_infinity),
            result.detach())


@torch.no_grad()
def frame_counts(call: Call) -> Tensor:
    """How often each label is the best of a valid frame, (V)."""
    best_TB = call.log_probs.argmax(dim=-1)
    valid_TB = valid_mask(call.input_lengths, best_TB.shape[0]).t()
    return torch.bincount(best_TB[valid_TB], minlength=call.log_probs.shape[-1])


@torch.no_grad()
def spread(call: Call) -> Tensor:
    """How much the probabilities differ from valid frame to valid frame: mean over labels of the standard deviation."""
    call = call.part()
    valid_TB = valid_mask(call.input_lengths, call.log_probs.shape[0]).t()
    return call.log_probs.float().exp()[valid_TB].std(dim=0).mean()


@torch.no_grad()
def target_counts(call: Call) -> Tensor:
    """How often each label occurs in the targets, (V)."""
    targets = call.targets
    if targets.dim() == 2:
        targets = targets[valid_mask(call.target_lengths, targets.shape[1])]
    vocabulary = call.log_probs.shape[-1]
    return torch.bincount(targets.reshape(-1).clamp(0, vocabulary - 1), minlength=vocabulary)


@torch.no_grad()
def constant_level(call: Call, counts: Tensor) -> float:
    """Loss, nats a label, of the best output that is the same in every frame and so cannot listen.

    The letters share what the blank leaves by how often they occur (`counts`, (V)); the blank's share is searched.
    This is the plateau on which CTC training starts; it depends on frames per label, so it is measured on the batch
    itself.
    """
    call = call.part()
    share = counts.double().clamp(min=0.1)
    share[call.blank] = 0
    share /= share.sum()
    frames, batch = call.log_probs.shape[:2]
    need, room = call.room()
    fits = need <= room
    if not bool(fits.any()):
        return float("nan")
    best = float("inf")
    for blank in (0.3, 0.5, 0.65, 0.75, 0.85, 0.92):
        row = share * (1 - blank)
        row[call.blank] = blank
        constant = row.clamp(min=1e-8).log().float()[None, None].expand(frames, batch, -1).contiguous()
        losses = torch.ctc_loss(
            constant, call.padded_targets(), call.input_lengths, call.target_lengths, call.blank, 0, True
        )
        best = min(best, float(losses[fits].sum() / call.target_lengths[fits].sum().clamp(min=1)))
    return best
