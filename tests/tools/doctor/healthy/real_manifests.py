"""Real speech: a train and a test manifest of other speakers, no model."""

import pytest

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import tones


def make(folder):
    rows = tones.real()
    if rows is None:
        pytest.skip("real LibriSpeech sample ../shared/librispeech/sample is not on this machine")
    test = tones.write(folder / "test.json", tones.real("train-clean-100"))
    return {"manifests": {"train": [tones.write(folder / "train.json", rows)], "test": [test]}}


HEALTHY = Healthy("real_manifests", "before", make)
