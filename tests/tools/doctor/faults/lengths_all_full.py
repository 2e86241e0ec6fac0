"""Lengths are ignored: every utterance is as long as the longest of its batch, for the recurrence and for the loss."""

import torch

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechRNN


class Encoder(SpeechRNN):
    def encode(self, x, length):
        return super().encode(x, torch.full_like(length, x.shape[2]))


FAULT = Fault("lengths_all_full", ("length-ignored",), "before", lambda folder: live(folder, mine(__name__)))
