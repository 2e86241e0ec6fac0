"""Raw 16-bit audio of a recorder that writes the high byte first, wrapped into files as if the low one were."""

import numpy as np

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import data, tones


def make(folder):
    def wrapped(rows):
        return [
            tones.rewrite(row, np.round(tones.samples(row) * 32767).astype(">i2").view("<i2"), folder / "wrapped")
            for row in rows
        ]

    return data(folder, wrapped)


FAULT = Fault("byte_order_of_a_recorder", ("data-silence",), "before", make)
