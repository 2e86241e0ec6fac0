"""Texts went through a word processor: curly apostrophes, no-break spaces, a carriage return at the end."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import data


def make(folder):
    def processed(rows):
        return [{**row, "text": row["text"].replace("'", "\u2019").replace(" ", "\u00a0", 1) + "\r"} for row in rows]

    return data(folder, processed)


FAULT = Fault("typographic_apostrophe", ("data-characters",), "before", make)
