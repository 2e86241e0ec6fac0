"""History: torchaudio's DeepSpeech as written, on LibriSpeech: NaN, with zero_infinity and clipping on.

Dense layers with a ReLU clipped at 20, one bidirectional recurrence with a ReLU that nothing bounds, no normalisation,
one output a frame.
"""

import pytest
from torch import nn
from torch.nn import functional as F

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import mine, models, tones
from tests.tools.doctor.setups.encoders import Encoder as Base


class Encoder(Base):
    def __init__(self, feat_in, hidden: int = 256):
        super().__init__()
        self._feat_in, self._feat_out, self.hidden = feat_in, hidden, hidden
        self.fc1, self.fc2, self.fc3 = nn.Linear(feat_in, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.bi_rnn = nn.RNN(hidden, hidden, num_layers=1, nonlinearity="relu", bidirectional=True)
        self.fc4 = nn.Linear(hidden, hidden)

    def encode(self, x, length):
        x = x.transpose(1, 2)
        for layer in (self.fc1, self.fc2, self.fc3):
            x = F.hardtanh(F.relu(layer(x)), 0, 20)
        x, _ = self.bi_rnn(x.transpose(0, 1))
        x = x[:, :, : self.hidden] + x[:, :, self.hidden :]
        x = F.hardtanh(F.relu(self.fc4(x)), 0, 20)
        return x.permute(1, 2, 0), length


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    rows = tones.real()
    if rows is None:
        pytest.skip("real LibriSpeech sample ../shared/librispeech/sample is not on this machine")
    # As most of LibriSpeech is: what a recurrence that grows makes of 4 s is still finite.
    rows = [row for row in rows if row["duration"] > 10]
    given = {"train": [tones.write(folder / "train.json", rows)]}
    section = models.section(mine(__name__), given, width=256, preprocessor=models.preprocessor(normalize=None),
                             optim={"name": "adamw", "lr": 1e-2}, **models.datasets(given, batch_size=4))
    model = models.build(section)
    return model, fit(model, folder, 40, callbacks)


def make(folder):
    from tests.tools.doctor.setups.runs import observed

    return observed(run)(folder)


FAULT = Fault("history_deepspeech_nan", ("explodes", "run-nan", "run-diverged"), "during", make, run)
