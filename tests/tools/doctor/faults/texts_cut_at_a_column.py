"""Texts went through a data base with a column of 30 characters; the audio is whole."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import data


def make(folder):
    return data(folder, lambda rows: [{**row, "text": row["text"][:30]} for row in rows], words=(4, 10))


FAULT = Fault("texts_cut_at_a_column", ("data-mismatched-text",), "before", make)
