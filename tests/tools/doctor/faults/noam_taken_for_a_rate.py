"""`lr: 0.001` with NoamAnnealing, where it is a multiplier: the peak is 6e-7."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import written


def make(folder):
    schedule = {"name": "NoamAnnealing", "d_model": 256, "warmup_steps": 10000, "warmup_ratio": None}
    optim = {"name": "adamw", "lr": 1e-3, "betas": [0.9, 0.98], "weight_decay": 1e-3, "sched": schedule}
    return written(folder, "conformer", trainer={"max_steps": 100000}, optim=optim)


FAULT = Fault("noam_taken_for_a_rate", ("lr-too-low",), "before", make)
