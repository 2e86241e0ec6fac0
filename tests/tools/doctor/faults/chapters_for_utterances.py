"""The text of the whole chapter stands at each of its utterances."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import data


def make(folder):
    def chapters(rows):
        whole = [" ".join(row["text"] for row in rows[i : i + 6]) for i in range(0, len(rows), 6)]
        return [{**row, "text": whole[i // 6]} for i, row in enumerate(rows)]

    return data(folder, chapters)


FAULT = Fault("chapters_for_utterances", ("data-target-too-long", "data-mismatched-text"), "before", make)
