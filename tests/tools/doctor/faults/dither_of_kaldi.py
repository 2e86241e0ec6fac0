"""Kaldi's dither of 1, meant for samples up to 32768, on samples up to 1: in training the model hears noise."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, written


def make(folder):
    return written(folder, preprocessor=models.preprocessor(dither=1.0))


FAULT = Fault(
    "dither_of_kaldi", ("features-bad", "augmentation-too-strong", "train-eval-differ", "data-scale"), "before", make
)
