"""The optimizer's name went from adamw to sgd, to save memory; the rate stayed Adam's."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, written


def make(folder):
    sched = models.optim()["sched"]
    return written(folder, optim={"name": "sgd", "lr": 1e-3, "weight_decay": 1e-3, "sched": sched})


FAULT = Fault("rate_of_adam_for_sgd", ("lr-too-low",), "before", make)
