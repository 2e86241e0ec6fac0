"""A QuartzNet by its YAML file alone, with trainer and data sections."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import written


def make(folder):
    return written(folder, "quartznet")


HEALTHY = Healthy("yaml_quartznet", "before", make)
