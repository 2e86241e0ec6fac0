"""NeMo's Conformer, a live model, on real speech."""

import pytest

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import models, tones


def make(folder):
    rows = tones.real()
    if rows is None:
        pytest.skip("real LibriSpeech sample ../shared/librispeech/sample is not on this machine")
    given = {"train": [tones.write(folder / "train.json", rows)],
             "validation": [tones.write(folder / "dev.json", tones.real("train-clean-100"))]}
    return {"model": models.build(models.section("conformer", given)), "manifests": given}


HEALTHY = Healthy("real_nemo_conformer", "before", make)
