"""The loss made a tensor anew from its number, to be rid of a warning: nothing hangs on it any more."""

import torch
from nemo.collections.asr.models import EncDecCTCModel

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live


class Model(EncDecCTCModel):
    def training_step(self, batch, batch_nb):
        loss = super().training_step(batch, batch_nb)["loss"]
        return {"loss": torch.tensor(loss.item(), requires_grad=True)}


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    model = live(folder, "transformer", cls=Model)["model"]
    return model, fit(model, folder, 60, callbacks)


FAULT = Fault(
    "loss_as_a_number", ("no-gradient",), "before", lambda folder: live(folder, "transformer", cls=Model), run
)
