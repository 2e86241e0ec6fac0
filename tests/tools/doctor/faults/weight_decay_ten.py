"""Weight decay 10 in AdamW: weights lose five percent at each step."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, written


def make(folder):
    return written(folder, "conv", optim=models.optim(weight_decay=10.0))


FAULT = Fault("weight_decay_ten", ("weight-decay-range",), "before", make)
