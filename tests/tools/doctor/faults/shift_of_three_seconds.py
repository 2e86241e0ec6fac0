"""NeMo's augmentor shifts the audio by up to 3 s where 5 ms are usual: speech leaves the window, its text stays."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, tones, written


def make(folder):
    train = models.datasets(tones.manifests(folder))["train_ds"]
    shift = {"prob": 1.0, "min_shift_ms": -3000.0, "max_shift_ms": 3000.0}
    return written(folder, "rnn", train_ds={**train, "augmentor": {"shift": shift}})


FAULT = Fault("shift_of_three_seconds", ("augmentation-too-strong",), "before", make)
