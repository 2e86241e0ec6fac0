"""DeepSpeech's ReLU recurrence without normalisation, every weight by He et al.: the state grows with each frame."""

from torch import nn, relu

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechRNN


class Encoder(SpeechRNN):
    def __init__(self, feat_in):
        super().__init__(feat_in)
        self.rnn = nn.RNN(self.hidden, self.hidden, 2, nonlinearity="relu", batch_first=True, bidirectional=True)
        for name, weight in self.rnn.named_parameters():
            if "weight" in name:
                nn.init.kaiming_normal_(weight, nonlinearity="relu")

    def project(self, x):
        return relu(self.out(x))


FAULT = Fault("relu_recurrence_kaiming", ("explodes",), "before", lambda folder: live(folder, mine(__name__)))
