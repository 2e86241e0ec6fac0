"""Label smoothing as it should be: 95 percent CTC, 5 percent towards the uniform distribution on real frames."""

from nemo.collections.asr.losses.ctc import CTCLoss

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import live
from tests.tools.doctor.setups.encoders import mask


class SmoothedCTC(CTCLoss):
    def forward(self, log_probs, targets, input_lengths, target_lengths):
        ctc = super().forward(
            log_probs=log_probs, targets=targets, input_lengths=input_lengths, target_lengths=target_lengths
        )
        uniform = -log_probs.mean(dim=-1)[mask(input_lengths, log_probs.shape[1])].sum() / len(log_probs)
        return 0.95 * ctc + 0.05 * uniform


def make(folder):
    given = live(folder, "conv")
    given["model"].loss = SmoothedCTC(28, zero_infinity=True)
    return given


HEALTHY = Healthy("label_smoothing_on_ctc", "before", make)
