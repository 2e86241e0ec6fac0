"""One transcript is missing, so that the last third of train has the text of the utterance after it."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import data


def make(folder):
    def shift(rows):
        start = 2 * len(rows) // 3
        texts = [row["text"] for row in rows]
        texts[start:] = [*texts[start + 1 :], texts[start]]
        return [{**row, "text": text} for row, text in zip(rows, texts)]

    return data(folder, shift, count=144)


FAULT = Fault("shifted_third", ("data-mismatched-text",), "before", make)
