"""StepLR as torch's examples have it, half the rate every ten epochs; NeMo steps it after every batch."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import written

OPTIM = {"name": "adamw", "lr": 5e-3, "betas": [0.9, 0.98], "weight_decay": 1e-3,
         "sched": {"name": "StepLR", "step_size": 10, "gamma": 0.5}}


def make(folder):
    return written(folder, optim=OPTIM)


FAULT = Fault("step_decay_meant_in_epochs", ("lr-too-low", "schedule-per-epoch", "lr-zero"), "before", make)
