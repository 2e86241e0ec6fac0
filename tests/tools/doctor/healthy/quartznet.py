"""NeMo's ConvASREncoder as QuartzNet has it: separable, residual, stride 2, a live model."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import live


def make(folder):
    return live(folder, "quartznet")


HEALTHY = Healthy("quartznet", "before", make)
