"""A bidirectional GRU over the padded batch, not packed: its second direction begins in the padding."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechRNN


class Encoder(SpeechRNN):
    def recur(self, x, length):
        return self.rnn(x)[0]


FAULT = Fault("padding_in_the_recurrence", ("padding-leak",), "before", lambda folder: live(folder, mine(__name__)))
