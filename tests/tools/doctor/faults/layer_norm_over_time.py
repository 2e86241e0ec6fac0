"""layer_norm over the last axis of (B, D, T): each feature is normalised over all frames, padding included."""

from torch.nn.functional import layer_norm

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechConv


class Encoder(SpeechConv):
    def normalise(self, norm, x, valid):
        return layer_norm(x * valid[:, None, :], x.shape[-1:])


FAULT = Fault(
    "layer_norm_over_time", ("norm-padding", "padding-leak"), "before", lambda folder: live(folder, mine(__name__))
)
