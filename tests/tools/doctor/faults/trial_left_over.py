"""Two batches of each epoch, left in the trainer from trying the program out."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import written


def make(folder):
    return written(folder, "rnn", trainer={"limit_train_batches": 2})


FAULT = Fault("trial_left_over", ("data-filtered",), "before", make)
