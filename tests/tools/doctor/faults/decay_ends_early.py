"""The cosine reaches zero after 50 steps, from the debugging config; the run has 1000."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, written


def make(folder):
    return written(folder, "rnn", optim=models.optim(sched={"max_steps": 50, "warmup_steps": 25, "min_lr": 0.0}))


FAULT = Fault("decay_ends_early", ("lr-zero", "lr-too-low"), "before", make)
