"""A hook that replaces the zeroing of the gradients, left from an experiment: every step adds to all before it."""

from nemo.collections.asr.models import EncDecCTCModel

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live


class Model(EncDecCTCModel):
    def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
        pass


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    model = live(folder, "transformer", cls=Model)["model"]
    return model, fit(model, folder, 100, callbacks)


def make(folder):
    from tests.tools.doctor.setups.runs import observed

    return observed(run)(folder)


FAULT = Fault("zero_grad_forgotten", ("gradients-kept",), "during", make, run)
