"""LibriSpeech's transcripts as published, in capitals, with labels in lower case."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import data


def make(folder):
    return data(folder, lambda rows: [{**row, "text": row["text"].upper()} for row in rows])


FAULT = Fault("upper_case", ("data-upper-case",), "before", make)
