"""Batches of four, accumulated over four: an own transformer."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import live


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    model = live(folder, "transformer")["model"]
    model.cfg.train_ds.batch_size = 4
    return model, fit(model, folder, 40, callbacks, accumulate_grad_batches=4)


def make(folder):
    from tests.tools.doctor.setups.runs import observed

    return observed(run)(folder)


HEALTHY = Healthy("during_accumulated", "during", make, run)
