"""Stochastic depth: a layer is left out with a probability of 0.2, and else what it adds is divided by 0.8."""

import torch

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechTransformer


class Encoder(SpeechTransformer):
    drop = 0.2

    def __init__(self, feat_in):
        super().__init__(feat_in, layers=5)

    def attend(self, layer, x, padding):
        if not self.training:
            return super().attend(layer, x, padding)
        if torch.rand(1) < self.drop:
            return x
        return x + (super().attend(layer, x, padding) - x) / 0.8


def make(folder):
    return live(folder, mine(__name__))


HEALTHY = Healthy("stochastic_depth_right", "before", make)
