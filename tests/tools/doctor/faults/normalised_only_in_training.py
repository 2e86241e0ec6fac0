"""The last LayerNorm stands under `if self.training`, where a line about dropout was meant to be."""

from torch import relu

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechRNN


class Encoder(SpeechRNN):
    def project(self, x):
        x = self.out(x)
        if self.training:
            x = self.norm3(x)
        return relu(x)


FAULT = Fault(
    "normalised_only_in_training", ("train-eval-differ",), "before", lambda folder: live(folder, mine(__name__))
)
