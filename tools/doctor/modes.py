"""Modules that are trained in eval mode: without dropout and masks, normalised by statistics that nothing follows."""

from __future__ import annotations

from torch import Tensor

from tools.doctor.causes import NORMS
from tools.doctor.finding import Finding

LOOKS = 3  # in a row
MUCH = 0.1  # share of the values that are trained


def keeps_statistics(module) -> bool:
    """Whether it normalises by running statistics in eval mode: that is often wanted in a fine-tuning."""
    return isinstance(getattr(module, "running_mean", None), Tensor)


class Modes:
    """Looks at the modes of a live model's modules, between the forward and the backward pass."""

    def __init__(self):
        self.asleep, self.said = 0, False

    def look(self, model, optimizers, step: int) -> Finding | None:
        """A finding, once, where the modules that hold what is trained are in eval mode."""
        if self.said:
            return None
        sizes: dict[int, int] = {}
        names, silent = [], []
        for name, module in model.named_modules():
            own = [p for p in module.parameters(recurse=False) if p.requires_grad]
            sizes |= {id(p): p.numel() for p in own}
            if own and not module.training and not keeps_statistics(module):
                names.append(name)
                silent += own
        if names:  # a teacher that nobody froze is in no optimizer
            held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
            silent = [p for p in silent if id(p) in held]
        share = sum({id(p): p.numel() for p in silent}.values()) / max(sum(sizes.values()), 1)
        self.asleep = self.asleep + 1 if share > MUCH else 0
        if self.asleep < LOOKS:
            return None
        self.said = True
        norms = [module for module in model.modules() if keeps_statistics(module)]
        still = sum(not module.training for module in norms)
        return Finding(
            "train-eval-differ", "warning",
            f"The model is trained in eval mode: at step {step} {len(names)} modules, with {share:.0%} of all trained "
            f"values, have training=False, first {names[0]}.",
            "Dropout and SpecAugment are off" + (f", and {still} of {len(norms)} batch normalisations use running statistics "
                                                 "that no batch updates" if still else "")
            + ". Something calls eval() and never train() again: a callback that transcribes samples; or the model came in "
            "eval mode, and fit() leaves it so.",
            {"modules in eval mode": names[:12], "of them": len(names), "share of trained values": round(share, 3),
             "model.training": model.training, NORMS: f"{still} of {len(norms)}"},
            ["model.train() after the samples: mode = model.training; model.eval(); ...; model.train(mode)",
             "model.train() before trainer.fit(model)"], 0.95, where=names[0])
