"""A recurrence that goes on from the state of the batch before, as in language models."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechRNN


class Encoder(SpeechRNN):
    state = None

    def recur(self, x, length):
        if self.state is not None and self.state.shape[1] != x.shape[0]:
            self.state = None
        x, state = self.rnn(x, self.state)
        self.state = state.detach()
        return x


FAULT = Fault("state_carried_over", ("batch-leak",), "before", lambda folder: live(folder, mine(__name__)))
