"""Two views of each batch, one behind the other; the targets are repeated one by one (repeat_interleave)."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live


def make(folder):
    from nemo.collections.asr.models import EncDecCTCModel

    class Model(EncDecCTCModel):
        def training_step(self, batch, batch_idx):
            audio, lengths, targets, sizes = batch
            log_probs, frames, _ = self(input_signal=audio.repeat(2, 1), input_signal_length=lengths.repeat(2))
            targets, sizes = targets.repeat_interleave(2, dim=0), sizes.repeat_interleave(2)
            return {"loss": self.loss(log_probs=log_probs, targets=targets, input_lengths=frames,
                                      target_lengths=sizes)}

    return live(folder, "transformer", cls=Model)


FAULT = Fault("views_interleaved", ("loss-wrong", "data-mismatched-text"), "before", make)
