"""NeMo's RNNEncoder, which runs over its padding: worth a warning, and it learns."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import live


def make(folder):
    return live(folder, "nemo_rnn")


HEALTHY = Healthy("nemo_rnn_encoder", "before", make)
