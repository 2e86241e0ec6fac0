"""A bidirectional GRU of one's own, packed, a live model."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import live


def make(folder):
    return live(folder, "rnn")


HEALTHY = Healthy("own_rnn", "before", make)
