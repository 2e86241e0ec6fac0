"""Durations of another cut of the corpus, without its long lead-ins: half of what the files hold."""

import numpy as np

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import data, tones


def make(folder):
    def recut(rows):
        changed = []
        for row in rows:
            audio = tones.samples(row)
            lead = 0.004 * np.random.default_rng(0).standard_normal(len(audio)).astype(np.float32)
            changed.append(tones.rewrite(row, np.concatenate([lead, audio]), folder / "recut"))
        return changed

    return data(folder, recut)


FAULT = Fault("durations_of_another_cut", ("data-duration-wrong",), "before", make)
