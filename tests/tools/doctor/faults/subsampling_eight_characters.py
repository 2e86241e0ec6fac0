"""The Conformer's subsampling factor raised from 4 to 8 to save memory, with characters as before."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, written


def make(folder):
    encoder = models.ENCODERS["conformer"]() | {"subsampling_factor": 8}
    return written(folder, encoder, corpus={"pace": 1.25})


FAULT = Fault("subsampling_eight_characters", ("data-target-too-long",), "before", make)
