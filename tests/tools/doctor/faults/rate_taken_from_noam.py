"""`lr: 5.0` copied from a Noam recipe, with CosineAnnealing, where it is the rate itself."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, written


def make(folder):
    return written(folder, "conformer", optim=models.optim(5.0))


FAULT = Fault("rate_taken_from_noam", ("lr-too-high",), "before", make)
