"""The rate of a Noam recipe, taken as it is, seen while it trains."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, models


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    model = live(folder, "conformer", optim=models.optim(5.0, sched={"warmup_steps": 5}))["model"]
    return model, fit(model, folder, 60, callbacks)


def make(folder):
    from tests.tools.doctor.setups.runs import observed

    return observed(run)(folder)


FAULT = Fault("rate_of_five_in_training", ("lr-too-high", "run-diverged", "run-nan"), "during", make, run)
