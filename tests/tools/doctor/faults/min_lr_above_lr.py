"""Fine-tuning's low rate under the schedule of the training from scratch, whose floor is higher."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, written


def make(folder):
    return written(folder, optim=models.optim(5e-5, sched={"min_lr": 1e-3}))


FAULT = Fault("min_lr_above_lr", ("lr-too-low", "lr-too-high"), "before", make)
