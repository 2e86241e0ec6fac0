"""The first steps of a training, where the output is all blank: a GRU of one's own."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import live


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    model = live(folder, "rnn")["model"]
    return model, fit(model, folder, 40, callbacks)


def make(folder):
    from tests.tools.doctor.setups.runs import observed

    return observed(run)(folder)


HEALTHY = Healthy("during_start_rnn", "during", make, run)
