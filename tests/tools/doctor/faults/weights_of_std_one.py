"""`nn.init.normal_(weight)` for all convolutions: a standard deviation of 1, and no normalisation between them."""

from torch import nn, relu

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechConv


class Encoder(SpeechConv):
    def __init__(self, feat_in):
        super().__init__(feat_in, layers=8)
        self.norms = nn.ModuleList(nn.Identity() for _ in self.norms)
        for conv in self.convs:
            nn.init.normal_(conv.weight)

    def normalise(self, norm, x, valid):
        return relu(x) * valid[:, None, :]


FAULT = Fault("weights_of_std_one", ("explodes",), "before", lambda folder: live(folder, mine(__name__)))
