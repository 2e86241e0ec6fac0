"""masked_fill with the mask of the real frames instead of the padding: nothing is left."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechRNN, mask


class Encoder(SpeechRNN):
    def convolve(self, x, length):
        x = super().convolve(x, length)
        return x.masked_fill(mask(self.lengths(length), x.shape[1])[:, :, None], 0.0)


FAULT = Fault("valid_frames_zeroed", ("output-constant",), "before", lambda folder: live(folder, mine(__name__)))
