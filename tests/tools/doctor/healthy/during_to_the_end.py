"""A QuartzNet trained until it has learned, with validation."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import live


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    model = live(folder, "quartznet")["model"]
    return model, fit(model, folder, 160, callbacks, validate=True, val_check_interval=40, check_val_every_n_epoch=None)


def make(folder):
    from tests.tools.doctor.setups.runs import observed

    return observed(run)(folder)


HEALTHY = Healthy("during_to_the_end", "during", make, run)
