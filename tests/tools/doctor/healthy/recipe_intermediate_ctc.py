"""Our Conformer recipe with NeMo's CTC loss at an inner layer."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import tones

SWITCHES = ("++model.interctc.loss_weights=[0.3]", "++model.interctc.apply_at_layers=[0]")


def make(folder):
    from tests.tools.doctor.setups.runs import compose

    given = tones.manifests(folder)
    return {"config": compose("conformer", given, folder, "training.epochs=80", *SWITCHES), "manifests": given}


HEALTHY = Healthy("recipe_intermediate_ctc", "before", make)
