"""Frames divided by their root mean square without an epsilon under the root: on padding the gradient is NaN."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechRNN, mask


class Encoder(SpeechRNN):
    def convolve(self, x, length):
        x = super().convolve(x, length)
        x = x * mask(self.lengths(length), x.shape[1])[:, :, None]
        return x / (x.pow(2).mean(dim=-1, keepdim=True).sqrt() + 1e-5)


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    model = live(folder, mine(__name__))["model"]
    return model, fit(model, folder, 20, callbacks)


def make(folder):
    from tests.tools.doctor.setups.runs import observed

    return observed(run)(folder)


FAULT = Fault("rms_of_silence", ("run-nan", "explodes"), "during", make, run)
