"""A focal CTC loss that weighs an utterance with p ** gamma, the likelihood itself, and not with (1 - p) ** gamma."""

from nemo.collections.asr.losses.ctc import CTCLoss

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live


class FocalCTC(CTCLoss):
    alpha, gamma = 0.25, 2.0

    def __init__(self, num_classes):
        super().__init__(num_classes, zero_infinity=True, reduction="none")

    def weight(self, p):
        return self.alpha * p**self.gamma

    def forward(self, log_probs, targets, input_lengths, target_lengths):
        losses = super().forward(
            log_probs=log_probs, targets=targets, input_lengths=input_lengths, target_lengths=target_lengths
        )
        return (self.weight((-losses).exp()) * losses).mean()


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    model = live(folder)["model"]
    model.loss = FocalCTC(28)
    return model, fit(model, folder, 100, callbacks)


def make(folder):
    from tests.tools.doctor.setups.runs import observed

    return observed(run)(folder)


FAULT = Fault("focal_weight_turned_round", ("loss-wrong", "vanishes", "run-plateau"), "during", make, run)
