"""10,000 steps of warm-up, from the recipe for 960 h, in a run of 600 steps."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, written


def make(folder):
    return written(folder, "rnn", trainer={"max_steps": 600}, optim=models.optim(2e-3, sched={"warmup_steps": 10000}))


FAULT = Fault("warmup_longer_than_the_run", ("warmup-too-long", "lr-too-low"), "before", make)
