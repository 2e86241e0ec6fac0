"""int16 samples cast to float without dividing, saved as float WAV: values up to 13,000."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import data, tones


def make(folder):
    def cast(rows):
        return [
            tones.rewrite(row, 32768 * tones.samples(row), folder / "cast", suffix=".wav", subtype="FLOAT")
            for row in rows
        ]

    return data(folder, cast)


FAULT = Fault("integer_scale", ("data-scale", "data-clipped"), "before", make)
