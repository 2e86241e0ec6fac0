"""Recordings at 8 kHz in a recipe for 16 kHz; the manifest says nothing of it."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import data, tones


def make(folder):
    def telephone(rows):
        changed = []
        for row in rows:
            row = {key: value for key, value in row.items() if key != "sampling_rate"}
            changed.append(tones.rewrite(row, tones.samples(row)[::2], folder / "telephone", rate=8000, suffix=".wav"))
        return changed

    return data(folder, telephone)


FAULT = Fault("telephone_rate", ("data-sample-rate",), "before", make)
