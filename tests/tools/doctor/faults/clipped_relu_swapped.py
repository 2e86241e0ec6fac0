"""The clipped ReLU with its bounds swapped: clamp(20, 0) is 0 everywhere."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechRNN


class Encoder(SpeechRNN):
    def project(self, x):
        return self.norm3(self.out(x)).clamp(20, 0)


FAULT = Fault(
    "clipped_relu_swapped", ("output-constant", "no-gradient"), "before", lambda folder: live(folder, mine(__name__))
)
