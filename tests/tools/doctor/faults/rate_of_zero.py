"""The learning rate went through an integer field of the sweep's form: 0.002 became 0."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, written


def make(folder):
    return written(folder, "quartznet", optim=models.optim(0, sched={"min_lr": 0.0}))


FAULT = Fault("rate_of_zero", ("lr-zero",), "before", make)
