"""Fast speech at eight times subsampling: most losses are infinite and zero_infinity makes them 0."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, models


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    encoder = models.ENCODERS["conformer"]() | {"subsampling_factor": 8}
    model = live(folder, encoder, corpus={"pace": 1.5})["model"]
    return model, fit(model, folder, 40, callbacks)


def make(folder):
    from tests.tools.doctor.setups.runs import observed

    return observed(run)(folder)


FAULT = Fault("infinite_losses_zeroed", ("infinite-loss-hidden", "data-target-too-long"), "during", make, run)
