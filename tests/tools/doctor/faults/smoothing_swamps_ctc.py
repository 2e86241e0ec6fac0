"""Label smoothing with the weights the wrong way round: 5 percent CTC, 95 percent towards the uniform distribution."""

from nemo.collections.asr.losses.ctc import CTCLoss

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live


class SmoothedCTC(CTCLoss):
    def forward(self, log_probs, targets, input_lengths, target_lengths):
        ctc = super().forward(
            log_probs=log_probs, targets=targets, input_lengths=input_lengths, target_lengths=target_lengths
        )
        uniform = -log_probs.mean(dim=-1).sum(dim=1).mean()
        return 0.05 * ctc + 0.95 * uniform


def make(folder):
    given = live(folder)
    given["model"].loss = SmoothedCTC(num_classes=28, zero_infinity=True)
    return given


FAULT = Fault("smoothing_swamps_ctc", ("loss-wrong",), "before", make)
