"""A transformer that normalises after its branches, at its full rate from the first step on: no warm-up."""

from torch import nn

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import mine, models, written
from tests.tools.doctor.setups.encoders import SpeechTransformer


class Encoder(SpeechTransformer):
    def __init__(self, feat_in):
        super().__init__(feat_in, layers=6)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(48, 4, 192, 0.0, batch_first=True, norm_first=False) for _ in range(6)
        )


def make(folder):
    return written(folder, mine(__name__), optim=models.optim(8e-3, sched={"warmup_steps": 0}))


FAULT = Fault("full_rate_from_the_first_step", ("warmup-missing", "lr-too-high"), "before", make)
