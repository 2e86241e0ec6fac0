"""A finished run on six utterances: known by heart, and worse on others with every pass."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import tones


def make(folder):
    from tests.tools.doctor.setups.runs import compose, train_recipe

    run = folder / "run"
    more = ["trainer.max_steps=300", "training.validations=8", "training.weight_decay=0", "model.spec_augment=null"]
    train_recipe(compose("conformer", tones.manifests(folder, count=6), run, *more), run)
    return {"run": str(run)}


FAULT = Fault("after_overfitting", ("run-overfitting",), "after", make)
