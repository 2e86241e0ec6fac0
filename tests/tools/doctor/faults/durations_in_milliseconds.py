"""Durations in milliseconds, as another toolkit writes them."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import data


def make(folder):
    return data(folder, lambda rows: [{**row, "duration": round(1000 * row["duration"])} for row in rows])


FAULT = Fault("durations_in_milliseconds", ("data-duration-wrong",), "before", make)
