"""A decoder whose weights start at zero: the first output is uniform for any input, and the encoder waits a step."""

from torch import nn

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import live


def make(folder):
    given = live(folder, "conv")
    head = given["model"].decoder.decoder_layers[0]
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return given


HEALTHY = Healthy("head_from_zero", "before", make)
