"""Two frames stacked by a view of (B, D, T) as (B, 2 D, T / 2): halves of the utterance are laid over each other."""

from torch.nn.functional import pad

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechTransformer


class Encoder(SpeechTransformer):
    def stacked(self, x):
        B, D, T = x.shape
        x = pad(x, (0, T % 2)).contiguous()
        return x.view(B, D * 2, x.shape[2] // 2).transpose(1, 2)


FAULT = Fault("stacked_without_transpose", ("time-scrambled",), "before", lambda folder: live(folder, mine(__name__)))
