"""In two fifths of the texts the spaces were lost."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import data


def without(rows):
    return [{**row, "text": row["text"].replace(" ", "")} if i % 5 < 2 else row for i, row in enumerate(rows)]


def make(folder):
    return data(folder, without, words=(6, 10))


FAULT = Fault("spaces_gone", ("data-mismatched-text",), "before", make)
