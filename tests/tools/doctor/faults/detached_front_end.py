"""`.detach()` between convolutions and recurrence, put in while looking for a memory leak."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechRNN


class Encoder(SpeechRNN):
    def recur(self, x, length):
        return super().recur(x.detach(), length)


FAULT = Fault("detached_front_end", ("no-gradient",), "before", lambda folder: live(folder, mine(__name__)))
