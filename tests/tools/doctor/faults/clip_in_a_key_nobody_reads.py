"""The gradient limit stands in the model section, where nothing reads it; the trainer clips nothing."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, written


def make(folder):
    optim = models.optim(0.02, sched={"warmup_steps": 10})
    return written(folder, "nemo_rnn", trainer={"gradient_clip_val": None}, optim=optim, gradient_clip_val=1.0)


FAULT = Fault("clip_in_a_key_nobody_reads", ("clip-missing",), "before", make)
