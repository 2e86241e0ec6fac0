"""NeMo's RNNEncoder in one direction, for streaming."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import live, models


def make(folder):
    return live(folder, models.ENCODERS["nemo_rnn"]() | {"bidirectional": False})


HEALTHY = Healthy("nemo_rnn_unidirectional", "before", make)
