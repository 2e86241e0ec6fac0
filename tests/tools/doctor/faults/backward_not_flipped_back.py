"""A hand-made second direction: the input is flipped in time, the output is not flipped back."""

import torch
from torch import nn

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechRNN


class Encoder(SpeechRNN):
    def __init__(self, feat_in):
        super().__init__(feat_in)
        self.rnn = nn.GRU(self.hidden, self.hidden, 1, batch_first=True)
        self.backward_rnn = nn.GRU(self.hidden, self.hidden, 1, batch_first=True)

    def recur(self, x, length):
        backward = self.backward_rnn(x.flip(1))[0]
        return torch.cat([self.rnn(x)[0], backward], dim=2)


FAULT = Fault("backward_not_flipped_back", ("time-scrambled",), "before", lambda folder: live(folder, mine(__name__)))
