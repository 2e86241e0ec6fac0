"""Somebody's training step makes features slower or faster and leaves their lengths and targets as they were."""

from torch.nn import functional as F

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live


def make(folder):
    from nemo.collections.asr.models import EncDecCTCModel

    class Model(EncDecCTCModel):
        def training_step(self, batch, batch_idx):
            audio, lengths, targets, sizes = batch
            x, lengths = self.preprocessor(input_signal=audio, length=lengths)
            x = F.interpolate(x, scale_factor=1.3)
            log_probs, frames, _ = self(processed_signal=x, processed_signal_length=lengths)
            return {"loss": self.loss(log_probs=log_probs, targets=targets, input_lengths=frames,
                                      target_lengths=sizes)}

    return live(folder, "rnn", cls=Model)


FAULT = Fault("tempo_lengths_left", ("loss-wrong",), "before", make)
