"""R-Drop: two passes with dropout whose outputs should agree, by `kl_div` of probabilities.

Its first argument has to be log-probabilities. Without the logarithm it falls without end where outputs are uniform.
"""

from nemo.collections.asr.models import EncDecCTCModel
from torch.nn.functional import kl_div

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine

HERE = "tests.tools.doctor.setups.encoders"


class Model(EncDecCTCModel):
    def divergence(self, first, second):
        p, q = first.exp(), second.exp()
        return (kl_div(p, q, reduction="batchmean") + kl_div(q, p, reduction="batchmean")) / 2

    def training_step(self, batch, batch_nb):
        signal, length, targets, target_lengths = batch
        views, ctc = [], 0.0
        for _ in range(2):
            log_probs, lengths, _ = self.forward(input_signal=signal, input_signal_length=length)
            ctc = ctc + self.loss(
                log_probs=log_probs, targets=targets, input_lengths=lengths, target_lengths=target_lengths
            )
            views.append(log_probs)
        loss = ctc / 2 + 5.0 * self.divergence(*views)
        self.log("train_loss", loss)
        return {"loss": loss}


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    model = live(folder, mine(HERE, "SpeechRNN", dropout=0.1), cls=Model)["model"]
    return model, fit(model, folder, 100, callbacks)


def make(folder):
    from tests.tools.doctor.setups.runs import observed

    return observed(run)(folder)


FAULT = Fault("divergence_without_logarithm", ("loss-wrong", "run-plateau"), "during", make, run)
