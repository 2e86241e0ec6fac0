"""The guard of the logarithm set to 0 and no dither, on audio with digital silence between the words."""

import numpy as np

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, models, tones


def make(folder):
    def gated(row):
        audio = tones.samples(row)
        loud = np.convolve(np.abs(audio), np.ones(400) / 400, mode="same") > 0.02  # a noise gate
        return tones.rewrite(row, audio * loud, folder / "gated")

    given = live(folder, preprocessor=models.preprocessor(log_zero_guard_value=0.0, dither=0.0))
    given["manifests"] = tones.manifests(folder, [gated(row) for row in tones.corpus(folder)])
    return given


FAULT = Fault("log_of_zero", ("features-bad",), "before", make)
