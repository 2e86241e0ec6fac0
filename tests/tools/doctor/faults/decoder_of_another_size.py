"""The decoder's feat_in left at 1024, from the large model; the encoder gives 48."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, written


def make(folder):
    return written(folder, "conformer", decoder=models.decoder(1024))


FAULT = Fault("decoder_of_another_size", ("model-does-not-build",), "before", make)
