"""Manifests alone: train, validation and test, nothing shared."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import tones


def make(folder):
    given = tones.manifests(folder, count=200)
    given["test"] = [tones.write(folder / "test.json", tones.corpus(folder, count=24, seed=9, name="test"))]
    return {"manifests": given}


HEALTHY = Healthy("tone_manifests", "before", make)
