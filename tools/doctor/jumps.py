"""Weights that change between two optimizer steps, where an epoch ends or a validation lies between them."""

from __future__ import annotations

import math

import torch

from tools.doctor.finding import Finding

VALUES = 256  # of each matrix that are held
FAR = 0.5  # of a matrix's size: no average, mask or limit moves it so far
BACK = 0.9  # share of the way since the last look that is taken back
TRAVELLED = 1e-3  # of a matrix's size, under which there is no way that could be taken back


class Jumps:
    """Holds some values of each matrix at the end of an epoch and before a validation, and compares them when the next
    step is to be made. What is swapped in for a validation and out again leaves nothing of that."""

    def __init__(self, model):
        self.matrices = [(name, p) for name, p in model.named_parameters()
                         if p.requires_grad and p.dim() >= 2 and p.numel() >= 64]
        self.looks, self.jumps = 0, []  # (step, names, largest change)
        self._held: list | None = None
        self._begin = self._values()  # where the way began that ends in what is held

    @torch.no_grad()
    def hold(self, trainer, batch_idx: int) -> None:
        """To be called after each batch."""
        every = trainer.val_check_batch
        validates = isinstance(every, int) and every > 0 and (batch_idx + 1) % every == 0
        if self.matrices and (trainer.is_last_batch or validates):
            self._held = self._values()

    @torch.no_grad()
    def _values(self) -> list:
        return [p.detach().reshape(-1)[:: max(p.numel() // VALUES, 1)][:VALUES].float().clone() for _, p in self.matrices]

    @torch.no_grad()
    def compare(self, step: int) -> Finding | None:
        """To be called before each optimizer step; a finding where it is the second time that weights have jumped."""
        if self._held is None:
            return None
        held, now, begin = self._held, self._values(), self._begin
        self._held, self._begin = None, now
        rows = torch.stack([torch.stack([(new - old).norm(), old.norm(), new.norm(), (old - first).norm(),
                                         ((old - first) * (old - new)).sum()])
                            for old, new, first in zip(held, now, begin)]).tolist()
        self.looks += 1
        names, largest = [], 0.0
        for (name, _), (change, old, new, way, back) in zip(self.matrices, rows):
            size = max(old, new, 1e-12)
            taken = way > TRAVELLED * size and back > BACK * way * way
            if math.isfinite(change) and (change > FAR * size or taken and change > 0):
                names.append(name)
                largest = max(largest, change / size)
        if not names:
            return None
        self.jumps.append((step, names, largest))
        return self._finding() if len(self.jumps) == 2 else None

    def _finding(self) -> Finding:
        (_, names, largest), steps = self.jumps[-1], [step for step, *_ in self.jumps]
        share = f"{len(names)} of {len(self.matrices)} matrices"
        return Finding(
            "weights-not-moved", "prevents",
            f"Weights are written between two optimizer steps, where an epoch ends or a validation lies: {share}, first "
            f"{names[0]}, changed by up to {largest:.0%} of their size after steps {' and '.join(map(str, steps))}.",
            "What was learned there since the last time is thrown away: layers that are initialised anew "
            "(reset_parameters), or an older copy that is put back (load_state_dict), in on_train_epoch_start, "
            "on_train_epoch_end or on_validation_end of the model or a callback.",
            {"matrices": names[:12], "of them": len(names), "of": len(self.matrices), "after steps": steps,
             "largest change by size": round(largest, 3), "looks": self.looks},
            ["initialise once, before fit(); look in the hooks of epochs and validations for reset_parameters(), init_(), "
             "copy_(), load_state_dict(), .data ="], 0.92, where=names[0])
