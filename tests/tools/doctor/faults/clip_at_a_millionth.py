"""Gradients clipped at a norm of 1e-6, with SGD: nothing moves."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import written


def make(folder):
    optim = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "sched": {"name": "CosineAnnealing", "warmup_steps": 50}}
    return written(folder, "conv", trainer={"gradient_clip_val": 1e-6}, optim=optim)


FAULT = Fault("clip_at_a_millionth", ("clip-too-low",), "before", make)
