"""Convolutions of one's own with BatchNorm over real frames, a live model; another seed."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import live


def make(folder):
    return live(folder, "conv", seed=3)


HEALTHY = Healthy("own_convolutions", "before", make)
