"""A training step that gives the loss the padded width for the lengths of all targets: padding is a target too."""

import torch
from nemo.collections.asr.models import EncDecCTCModel

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live


class Model(EncDecCTCModel):
    def training_step(self, batch, batch_nb):
        audio, lengths, targets, target_lengths = batch
        return super().training_step((audio, lengths, targets, torch.full_like(target_lengths, targets.shape[1])),
                                     batch_nb)


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    model = live(folder, "transformer", cls=Model)["model"]
    return model, fit(model, folder, 100, callbacks)


FAULT = Fault(
    "targets_with_their_padding", ("loss-wrong",), "before", lambda folder: live(folder, "transformer", cls=Model), run
)
