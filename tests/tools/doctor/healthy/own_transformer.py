"""A transformer of one's own with torch's layers, a live model."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import live


def make(folder):
    return live(folder, "transformer")


HEALTHY = Healthy("own_transformer", "before", make)
