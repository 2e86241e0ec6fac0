"""A gradient reversal, meant for a branch that tells speakers apart, stands on the way to the decoder."""

import torch

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechRNN


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Encoder(SpeechRNN):
    def project(self, x):
        return super().project(Reversed.apply(x))


def make(folder):
    return live(folder, mine(__name__))


FAULT = Fault("reversal_left_in", ("step-uphill",), "before", make)
