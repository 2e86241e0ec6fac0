"""Recorded 40 dB too loud, then cut at full scale."""

import numpy as np

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import data, tones


def make(folder):
    def loud(rows):
        return [
            tones.rewrite(row, np.clip(100 * tones.samples(row), -1, 1), folder / "loud", suffix=".wav") for row in rows
        ]

    return data(folder, loud)


FAULT = Fault("clipped", ("data-clipped",), "before", make)
