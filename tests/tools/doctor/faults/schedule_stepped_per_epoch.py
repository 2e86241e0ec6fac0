"""Optimizer and schedule returned as two lists, as in Lightning's examples: the schedule steps once an epoch."""

import torch
from nemo.collections.asr.models import EncDecCTCModel

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live


class Model(EncDecCTCModel):
    def configure_optimizers(self):
        self._optimizer = torch.optim.AdamW(self.parameters(), lr=5e-3)
        warm = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: min((step + 1) / 500, 1.0))
        return [self._optimizer], [warm]


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    model = live(folder, "conv", cls=Model)["model"]
    return model, fit(model, folder, 60, callbacks)


def make(folder):
    from tests.tools.doctor.setups.runs import observed

    return observed(run)(folder)


FAULT = Fault("schedule_stepped_per_epoch", ("schedule-per-epoch",), "during", make, run)
