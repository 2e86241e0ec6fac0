"""Six causal convolutions for streaming, padded once: the newest frame has the least weight, and not none."""

from torch import nn

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechRNN, mask


class Encoder(SpeechRNN):
    def __init__(self, feat_in):
        super().__init__(feat_in)
        self.rnn = None
        self.convs = nn.ModuleList(nn.Conv1d(48, 48, 9) for _ in range(6))
        self.norms = nn.ModuleList(nn.LayerNorm(48) for _ in self.convs)

    def encode(self, x, length):
        x = self.convolve(x, length)
        length = self.lengths(length)
        valid, frames = mask(length, x.shape[1])[:, :, None], x.shape[1]
        for conv, norm in zip(self.convs, self.norms):
            padded = nn.functional.pad((x * valid).transpose(1, 2), (8, 0))
            x = norm(conv(padded)[:, :, :frames].transpose(1, 2)).relu()
        return (x * valid).transpose(1, 2), length


def make(folder):
    return live(folder, mine(__name__))


HEALTHY = Healthy("causal_convolutions", "before", make)
