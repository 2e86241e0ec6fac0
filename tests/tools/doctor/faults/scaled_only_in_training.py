"""Embedding scale applied under `if self.training`, meant for the dropout on the next line."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechRNN


class Encoder(SpeechRNN):
    def project(self, x):
        if self.training:
            x = x * self.hidden**0.5
            x = self.dropout(x)
        return self.out(x)


FAULT = Fault("scaled_only_in_training", ("train-eval-differ",), "before", lambda folder: live(folder, mine(__name__)))
