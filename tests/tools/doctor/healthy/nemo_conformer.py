"""NeMo's stock Conformer, characters, four times subsampling, a live model."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import live


def make(folder):
    return live(folder, "conformer")


HEALTHY = Healthy("nemo_conformer", "before", make)
