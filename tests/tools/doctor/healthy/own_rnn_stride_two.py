"""Batches of four, stride 2, dropout, SpecAugment, another seed: a GRU of one's own."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import live, mine, models


def make(folder):
    encoder = mine("tests.tools.doctor.setups.encoders", "SpeechRNN", dropout=0.1, strides=[2, 1])
    given = live(folder, encoder, seed=11, spec_augment=models.spec_augment())
    for name in ("train_ds", "validation_ds"):
        given["model"].cfg[name].batch_size = 4
    return given


HEALTHY = Healthy("own_rnn_stride_two", "before", make)
