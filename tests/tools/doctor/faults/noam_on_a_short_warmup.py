"""Noam with lr 5 and 100 steps of warm-up instead of 10,000, on a small model: the peak is 0.07."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import written


def make(folder):
    schedule = {"name": "NoamAnnealing", "d_model": 48, "warmup_steps": 100, "warmup_ratio": None, "min_lr": 1e-6}
    optim = {"name": "adamw", "lr": 5.0, "betas": [0.9, 0.98], "weight_decay": 1e-3, "sched": schedule}
    return written(folder, "conformer", optim=optim)


FAULT = Fault("noam_on_a_short_warmup", ("lr-too-high",), "before", make)
