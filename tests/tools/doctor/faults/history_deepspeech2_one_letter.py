"""History: a DeepSpeech2 that learned one batch by heart and says one letter, or nothing, on more data.

Its recurrence has no batch_first. On one fixed batch the neighbours are always the same and as good a key as any; on
shuffled batches they are noise.
"""

from torch import nn

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import Encoder as Base


class Encoder(Base):
    def __init__(self, feat_in, channels: int = 8, hidden: int = 48):
        super().__init__()
        self._feat_in, self._feat_out = feat_in, hidden
        self.conv = nn.Sequential(
            nn.Conv2d(1, channels, (11, 5), (2, 2), (5, 2)), nn.BatchNorm2d(channels), nn.Hardtanh(0, 20),
            nn.Conv2d(channels, channels, (11, 5), (2, 2), (5, 2)), nn.BatchNorm2d(channels), nn.Hardtanh(0, 20),
        )
        self.rnns = nn.ModuleList(
            nn.GRU(size, hidden, bidirectional=True) for size in (channels * ((feat_in + 3) // 4), hidden, hidden)
        )

    def encode(self, x, length):
        x = self.conv(x[:, None])
        B, C, D, T = x.shape
        x = x.permute(0, 3, 1, 2).reshape(B, T, C * D)
        for rnn in self.rnns:
            x = rnn(x)[0]
            x = x[:, :, : x.shape[2] // 2] + x[:, :, x.shape[2] // 2 :]
        return x.transpose(1, 2), (length + 3) // 4


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    model = live(folder, mine(__name__))["model"]
    return model, fit(model, folder, 60, callbacks)


def make(folder):
    from tests.tools.doctor.setups.runs import observed

    return observed(run)(folder)


FAULT = Fault(
    "history_deepspeech2_one_letter", ("batch-leak", "run-collapse-letter", "run-collapse-blank"), "during", make, run
)
