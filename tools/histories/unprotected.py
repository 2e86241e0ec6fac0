"""The training step as users write it: torch's loss with zero_infinity, a gradient-norm limit, and nothing else.

The recipes' own model class names a batch that is not finite and leaves it out; with that, NaN never comes into the
parameters, and what was reported cannot be seen. Here nothing is left out, and the first step that is not finite is
taken apart: what was broken before the loss, after it, after clipping, after the optimizer.
"""

from __future__ import annotations

import torch
from lightning.pytorch import Callback
from torch import Tensor

from recipes.ctc_loss import CTCLoss
from recipes.ctc_model import CTCModel


class UsualLoss(CTCLoss):
    """torch.nn.CTCLoss(zero_infinity=True), whose mean is over utterances, each divided by its target's length."""

    def forward(self, log_probs, targets, input_lengths, target_lengths):
        self.finite_before = bool(torch.isfinite(log_probs).all())
        self.largest = float(log_probs.detach().abs().max())
        return super().forward(log_probs, targets, input_lengths, target_lengths)

    def average(self, losses: Tensor, infeasible: Tensor, target_lengths: Tensor) -> Tensor:
        return (losses / target_lengths.clamp(min=1)).mean()


class UsualModel(CTCModel):
    """A recipe's model without its protection: every batch is trained on."""

    def _use_our_loss(self) -> None:
        self.loss = UsualLoss(self.decoder.num_classes_with_blank - 1)
        self.anatomy: dict = {}

    def _any_device(self, bad, end):
        return False, bool(end)

    def on_before_optimizer_step(self, optimizer):
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.step_stats.grad_norm = norm
        self.log("grad_norm", norm)
        if not self.anatomy and not bool(torch.isfinite(norm)):
            self.anatomy = {
                "step": self.trainer.global_step,
                "log_probs_finite": self.loss.finite_before,
                "loss": float(self.step_stats.loss),
                "grad_norm": float(norm),
                "gradients": len(gradients),
                "gradients_broken": broken(gradients),
            }

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if self.anatomy and "clip" not in self.anatomy:
            self.anatomy["clip"] = float(gradient_clip_val or 0)
            self.anatomy["gradients_broken_after_clipping"] = broken(p.grad for p in self.parameters())

    def on_train_batch_end(self, outputs, batch, batch_idx, *args):
        if self.anatomy and "parameters_broken" not in self.anatomy:
            self.anatomy["parameters"] = len(list(self.parameters()))
            self.anatomy["parameters_broken"] = broken(self.parameters())


class DroppingModel(CTCModel):
    """Its text encoder leaves out what is not among the labels, without a word."""

    def text_encoder(self):
        index = {label: position for position, label in enumerate(self.decoder.vocabulary)}
        return lambda text: [index[character] for character in text if character in index]


class StopAfterNaN(Callback):
    """Ends a run that is lost, `patience` steps after its last finite loss: what follows is the same for ever."""

    def __init__(self, patience: int = 6):
        self.patience, self.seen = patience, 0

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        self.seen = 0 if bool(torch.isfinite(torch.as_tensor(model.step_stats.loss))) else self.seen + 1
        if self.seen >= self.patience:
            trainer.should_stop = True


def broken(tensors) -> int:
    """How many of the tensors hold anything that is not finite."""
    return sum(not bool(torch.isfinite(t).all()) for t in tensors if t is not None)
