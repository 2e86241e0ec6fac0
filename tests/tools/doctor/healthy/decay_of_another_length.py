"""A cosine of 50 steps, from the debugging config, in a run of 1000: NeMo puts the trainer's steps in its place."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import models, written


def make(folder):
    return written(folder, "rnn", optim=models.optim(sched={"max_steps": 50, "warmup_steps": 25, "min_lr": 0.0}))


HEALTHY = Healthy("decay_of_another_length", "before", make)
