"""Audio on a network disk that needs 0.1 s a file, and no workers."""

import time

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    model = live(folder, "conv")["model"]
    model.setup_training_data(model.cfg.train_ds)
    dataset = model._train_dl.dataset
    read = dataset.featurizer.process if hasattr(dataset, "featurizer") else None

    def slow(*arguments, **named):
        time.sleep(0.1)
        return read(*arguments, **named)

    dataset.featurizer.process = slow
    return model, fit(model, folder, 24, callbacks)


def make(folder):
    from tests.tools.doctor.setups.runs import observed

    return observed(run)(folder)


FAULT = Fault("slow_disk", ("data-slow",), "during", make, run)
