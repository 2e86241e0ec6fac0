"""A third of the texts are empty: the script that joined transcripts and audio missed a naming scheme."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import data


def make(folder):
    return data(folder, lambda rows: [{**row, "text": ""} if i % 3 == 0 else row for i, row in enumerate(rows)])


FAULT = Fault("empty_texts", ("data-empty-text",), "before", make)
