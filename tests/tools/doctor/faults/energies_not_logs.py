"""Mel energies without logarithm and without normalisation: from 1e-6 to some thousands."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, models


def make(folder):
    return live(folder, "transformer", preprocessor=models.preprocessor(log=False, normalize=None))


FAULT = Fault("energies_not_logs", ("features-bad",), "before", make)
