"""NeMo's Conformer in training with SpecAugment."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import live, models


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    model = live(folder, "conformer", spec_augment=models.spec_augment())["model"]
    return model, fit(model, folder, 100, callbacks)


def make(folder):
    from tests.tools.doctor.setups.runs import observed

    return observed(run)(folder)


HEALTHY = Healthy("during_nemo_conformer", "during", make, run)
