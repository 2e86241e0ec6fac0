"""BatchNorm with momentum 0.0005, "slower is smoother": at evaluation it still has the statistics of the start."""

from torch import nn

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechConv


class Encoder(SpeechConv):
    def __init__(self, feat_in):
        super().__init__(feat_in)
        self.norms = nn.ModuleList(nn.BatchNorm1d(48, momentum=0.0005) for _ in self.norms)


FAULT = Fault("batchnorm_hardly_updates", ("train-eval-differ",), "before", lambda folder: live(folder, mine(__name__)))
