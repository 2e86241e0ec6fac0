"""`n_layer` for `n_layers`."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, written


def make(folder):
    encoder = models.ENCODERS["conformer"]()
    encoder["n_layer"] = encoder.pop("n_layers")
    return written(folder, encoder)


FAULT = Fault("misspelled_key", ("model-does-not-build",), "before", make)
