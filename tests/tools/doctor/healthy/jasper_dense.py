"""NeMo's Jasper: plain convolutions, dense residuals, dropout."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import live, models


def make(folder):
    block = models._block
    jasper = [block(48, 11, stride=2, separable=False), block(48, 11, residual=True, repeat=2, separable=False),
              block(64, 13, residual=True, repeat=2, separable=False), block(96, 1, separable=False)]
    for part in jasper[1:3]:
        part |= {"residual_dense": True, "dropout": 0.2}
    return live(folder, models.ENCODERS["quartznet"]() | {"jasper": jasper}, width=96)


HEALTHY = Healthy("jasper_dense", "before", make)
