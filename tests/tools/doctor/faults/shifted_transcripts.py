"""The transcripts are one line below their audio: a header line was read as a text."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import data


def make(folder):
    def shift(rows):
        return [{**row, "text": rows[i - 1]["text"]} for i, row in enumerate(rows)]

    return data(folder, shift)


FAULT = Fault("shifted_transcripts", ("data-mismatched-text",), "before", make)
