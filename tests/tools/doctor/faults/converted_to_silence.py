"""A conversion failed half way: 40 % of the files have the right length and nothing in them."""

import numpy as np

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import data, tones


def make(folder):
    def convert(rows):
        return [
            tones.rewrite(row, np.zeros_like(tones.samples(row)), folder / "converted") if i % 5 < 2 else row
            for i, row in enumerate(rows)
        ]

    return data(folder, convert)


FAULT = Fault("converted_to_silence", ("data-silence",), "before", make)
