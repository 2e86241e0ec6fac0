"""A guard against broken batches leaves out those with a loss above 10: at the start of training that is every one."""

import torch
from nemo.collections.asr.models import EncDecCTCModel

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live


class Model(EncDecCTCModel):
    def training_step(self, batch, batch_nb):
        output = super().training_step(batch, batch_nb)
        loss = output["loss"].detach()
        if not torch.isfinite(loss) or loss > 10:
            return None
        return output


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    model = live(folder, cls=Model)["model"]
    return model, fit(model, folder, 60, callbacks)


def make(folder):
    from tests.tools.doctor.setups.runs import observed

    return observed(run)(folder)


FAULT = Fault("loss_guard_skips_all", ("weights-not-moved", "run-plateau"), "during", make, run)
