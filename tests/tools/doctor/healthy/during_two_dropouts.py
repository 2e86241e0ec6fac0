"""R-Drop as it should be: two passes with dropout, their CTC losses, and a fifth of their divergence on real frames."""

from nemo.collections.asr.models import EncDecCTCModel
from torch.nn.functional import kl_div

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import mask

HERE = "tests.tools.doctor.setups.encoders"


class Model(EncDecCTCModel):
    def training_step(self, batch, batch_nb):
        signal, length, targets, target_lengths = batch
        views, ctc = [], 0.0
        for _ in range(2):
            log_probs, lengths, _ = self.forward(input_signal=signal, input_signal_length=length)
            ctc = ctc + self.loss(
                log_probs=log_probs, targets=targets, input_lengths=lengths, target_lengths=target_lengths
            )
            views.append(log_probs[mask(lengths, log_probs.shape[1])])
        one, other = views
        apart = sum(kl_div(*pair, reduction="sum", log_target=True) for pair in ((one, other), (other, one)))
        loss = ctc / 2 + 0.2 * apart / (2 * len(signal))
        self.log("train_loss", loss)
        return {"loss": loss}


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    model = live(folder, mine(HERE, "SpeechRNN", dropout=0.1), cls=Model)["model"]
    return model, fit(model, folder, 100, callbacks)


def make(folder):
    from tests.tools.doctor.setups.runs import observed

    return observed(run)(folder)


HEALTHY = Healthy("during_two_dropouts", "during", make, run)
