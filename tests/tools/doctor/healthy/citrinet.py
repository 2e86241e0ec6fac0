"""NeMo's ConvASREncoder as Citrinet has it: squeeze and excitation, stride 4, a live model."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import live


def make(folder):
    return live(folder, "citrinet")


HEALTHY = Healthy("citrinet", "before", make)
