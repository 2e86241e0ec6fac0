"""Mel filters up to 800 Hz: what tells vowels and consonants apart lies above."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, models


def make(folder):
    return live(folder, "rnn", preprocessor=models.preprocessor(highfreq=800))


FAULT = Fault("filters_of_a_bass", ("features-bad",), "before", make)
