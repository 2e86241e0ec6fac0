"""A unidirectional GRU for streaming: an output depends on the past alone."""

from torch import nn

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechRNN


class Encoder(SpeechRNN):
    def __init__(self, feat_in):
        super().__init__(feat_in)
        self.rnn = nn.GRU(self.hidden, 2 * self.hidden, batch_first=True)


def make(folder):
    return live(folder, mine(__name__))


HEALTHY = Healthy("causal_rnn", "before", make)
