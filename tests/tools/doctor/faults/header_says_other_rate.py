"""16 kHz samples written with a header that says 8 kHz: everything sounds twice as slow after resampling."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import data, tones


def make(folder):
    def wrong_header(rows):
        return [tones.rewrite(row, tones.samples(row), folder / "header", rate=8000, suffix=".wav") for row in rows]

    return data(folder, wrong_header)


FAULT = Fault("header_says_other_rate", ("data-sample-rate", "data-duration-wrong"), "before", make)
