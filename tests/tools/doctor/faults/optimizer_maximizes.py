"""maximize=true, copied from a script that maximised a reward: steps go up the gradient."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import written


def make(folder):
    return written(folder, "conv", optim={"name": "adamw", "lr": 2e-3, "maximize": True,
                                          "sched": {"name": "CosineAnnealing", "warmup_steps": 50}})


FAULT = Fault("optimizer_maximizes", ("step-uphill",), "before", make)
