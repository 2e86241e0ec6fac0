"""Adam's eps at 1, far above the gradients: of the learning rate next to nothing arrives."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import written


def make(folder):
    return written(folder, "rnn", optim={"name": "adamw", "lr": 1e-3, "eps": 1.0,
                                         "sched": {"name": "CosineAnnealing", "warmup_steps": 50}})


FAULT = Fault("eps_of_one", ("lr-too-low",), "before", make)
