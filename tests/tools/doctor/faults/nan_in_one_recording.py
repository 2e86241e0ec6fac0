"""One float WAV of 96 holds a NaN: BatchNorm's statistics take it in and keep it."""

import numpy as np

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, tones


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    rows = tones.corpus(folder)
    audio = tones.samples(rows[20])
    audio[1000] = np.nan
    rows[20] = tones.rewrite(rows[20], audio, folder / "broken", suffix=".wav", subtype="FLOAT")
    given = tones.manifests(folder, rows)
    model = models.build(models.section("citrinet", given))
    return model, fit(model, folder, 30, callbacks)


def make(folder):
    from tests.tools.doctor.setups.runs import observed

    return observed(run)(folder)


FAULT = Fault("nan_in_one_recording", ("features-bad", "run-nan"), "during", make, run)
