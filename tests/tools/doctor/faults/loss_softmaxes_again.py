"""The loss of another code base, which takes scores and normalises them by a softmax before its logarithm."""

import torch
from nemo.collections.asr.losses.ctc import CTCLoss

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live


class ScoresCTC(CTCLoss):
    def forward(self, log_probs, targets, input_lengths, target_lengths):
        probabilities = torch.sigmoid(log_probs)
        return super().forward(
            log_probs=torch.log_softmax(probabilities, dim=-1), targets=targets, input_lengths=input_lengths,
            target_lengths=target_lengths,
        )


def make(folder):
    given = live(folder)
    given["model"].loss = ScoresCTC(num_classes=28, zero_infinity=True)
    return given


FAULT = Fault("loss_softmaxes_again", ("loss-wrong", "not-log-probs"), "before", make)
