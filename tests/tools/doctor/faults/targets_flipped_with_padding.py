"""Targets turned round with their padding, by a line left from a model that reads from right to left."""

from nemo.collections.asr.models import EncDecCTCModel

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live


class Model(EncDecCTCModel):
    def training_step(self, batch, batch_nb):
        audio, lengths, targets, target_lengths = batch
        return super().training_step((audio, lengths, targets.flip(1), target_lengths), batch_nb)


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    model = live(folder, "transformer", cls=Model)["model"]
    return model, fit(model, folder, 100, callbacks)


FAULT = Fault(
    "targets_flipped_with_padding", ("loss-wrong",), "before", lambda folder: live(folder, "transformer", cls=Model),
    run
)
