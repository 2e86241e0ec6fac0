"""`model.encoder.freeze()` from a fine-tuning tutorial, on a model that starts from nothing."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live


def make(folder):
    given = live(folder, "conv")
    given["model"].encoder.freeze()
    return given


FAULT = Fault("encoder_frozen", ("frozen",), "before", make)
