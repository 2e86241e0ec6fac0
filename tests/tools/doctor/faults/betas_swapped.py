"""AdamW's betas the wrong way round: the mean of gradients over fifty steps, their size over ten."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, written


def make(folder):
    return written(folder, optim=models.optim(betas=[0.98, 0.9]))


FAULT = Fault("betas_swapped", ("optimizer-betas",), "before", make)
