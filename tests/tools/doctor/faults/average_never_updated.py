"""Evaluation by averaged weights that nothing ever updates: training learns, evaluation is by the first weights."""

import copy

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine, tones
from tests.tools.doctor.setups.encoders import SpeechTransformer


class Encoder(SpeechTransformer):
    def __init__(self, feat_in, **more):
        super().__init__(feat_in, **more)
        self.average = copy.deepcopy(self.layers)
        for p in self.average.parameters():
            p.requires_grad_(False)

    def encode(self, x, length):
        trained = self.layers
        if not self.training:
            self.layers = self.average
        try:
            return super().encode(x, length)
        finally:
            self.layers = trained


def make(folder):
    from tests.tools.doctor.setups import learning

    given = live(folder, mine(__name__))
    learning.learn(given["model"], tones.read(given["manifests"]["train"][0]), 60)
    return given


FAULT = Fault("average_never_updated", ("train-eval-differ", "frozen"), "before", make)
