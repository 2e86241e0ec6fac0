"""Evaluation by averaged weights that are updated at every step: those that are frozen are so on purpose."""

import torch

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.faults.average_never_updated import Encoder as Averaged
from tests.tools.doctor.setups import live, mine


class Encoder(Averaged):
    @torch.no_grad()
    def update(self, rate: float = 0.1):
        for average, own in zip(self.average.parameters(), self.layers.parameters()):
            average.lerp_(own, rate)

    def encode(self, x, length):
        if self.training:
            self.update()
        return super().encode(x, length)


def make(folder):
    return live(folder, mine(__name__))


HEALTHY = Healthy("ema_updated", "before", make)
