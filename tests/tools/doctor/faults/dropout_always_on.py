"""F.dropout without `training=self.training`: half of the units are off at evaluation too."""

from torch.nn import functional as F

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechRNN


class Encoder(SpeechRNN):
    def recur(self, x, length):
        return super().recur(F.dropout(x, 0.5), length)


FAULT = Fault("dropout_always_on", ("train-eval-differ",), "before", lambda folder: live(folder, mine(__name__)))
