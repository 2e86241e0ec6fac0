"""Stochastic depth with the probability of keeping a layer, 0.9, taken for that of leaving it out."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.healthy.stochastic_depth_right import Encoder as Healthy
from tests.tools.doctor.setups import live, mine


class Encoder(Healthy):
    drop = 0.9


def make(folder):
    return live(folder, mine(__name__))


FAULT = Fault("stochastic_depth_keeps_a_tenth", ("train-eval-differ",), "before", make)
