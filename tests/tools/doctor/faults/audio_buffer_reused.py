"""A reader that decodes into one buffer and returns a view of it: all items of a batch are the one read last."""

import numpy as np
import soundfile
import torch

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, tones


class Reader:
    """In place of NeMo's featurizer, without its copies."""

    def __init__(self, seconds: float = 30.0):
        self.buffer = np.zeros(int(seconds * tones.RATE), dtype=np.float32)

    def process(self, path, **_):
        return torch.from_numpy(soundfile.read(path, out=self.buffer)[0])


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    model = live(folder)["model"]
    model.setup_training_data(model.cfg.train_ds)
    model._train_dl.dataset.featurizer = Reader()
    return model, fit(model, folder, 60, callbacks)


def make(folder):
    from tests.tools.doctor.setups.runs import observed

    return observed(run)(folder)


FAULT = Fault("audio_buffer_reused", ("data-mismatched-text", "batch-leak", "run-plateau"), "during", make, run)
