"""`nn.GRU` without batch_first, given (B, T, H): the recurrence runs over the utterances of the batch."""

from torch import nn

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechRNN


class Encoder(SpeechRNN):
    def __init__(self, feat_in):
        super().__init__(feat_in)
        self.rnn = nn.GRU(self.hidden, self.hidden, 1, bidirectional=True)

    def recur(self, x, length):
        return self.rnn(x)[0]


FAULT = Fault("batch_axis_recurrence", ("batch-leak",), "before", lambda folder: live(folder, mine(__name__)))
