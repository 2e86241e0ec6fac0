"""A second corpus was added whose transcripts are in capitals: a quarter of train."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import data


def make(folder):
    def add(rows):
        return [{**row, "text": row["text"].upper()} if i >= 72 else row for i, row in enumerate(rows)]

    return data(folder, add)


FAULT = Fault("upper_case_second_corpus", ("data-upper-case",), "before", make)
