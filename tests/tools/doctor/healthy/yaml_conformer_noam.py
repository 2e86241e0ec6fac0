"""NeMo's Conformer by its YAML with Noam set right: a peak of 4e-3 after 100 steps."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import written


def make(folder):
    schedule = {"name": "NoamAnnealing", "d_model": 48, "warmup_steps": 100, "warmup_ratio": None, "min_lr": 1e-6}
    optim = {"name": "adamw", "lr": 0.28, "betas": [0.9, 0.98], "weight_decay": 1e-3, "sched": schedule}
    return written(folder, "conformer", optim=optim)


HEALTHY = Healthy("yaml_conformer_noam", "before", make)
