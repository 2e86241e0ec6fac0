"""Interviews with a microphone a speaker: two channels."""

import numpy as np

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import data, tones


def make(folder):
    def interview(rows):
        changed = []
        for row in rows:
            audio = tones.samples(row)
            changed.append(tones.rewrite(row, np.stack([audio, 0.1 * audio], axis=1), folder / "stereo", suffix=".wav"))
        return changed

    return data(folder, interview)


FAULT = Fault("stereo", ("data-channels",), "before", make)
