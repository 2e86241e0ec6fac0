"""A transformer by its YAML with SGD, momentum and a constant rate after the warm-up."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import written


def make(folder):
    schedule = {"name": "WarmupHoldPolicy", "warmup_steps": 20, "hold_steps": 100000, "max_steps": 1000, "min_lr": 0.0}
    optim = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.0, "sched": schedule}
    return written(folder, "transformer", optim=optim)


HEALTHY = Healthy("yaml_transformer_sgd", "before", make)
