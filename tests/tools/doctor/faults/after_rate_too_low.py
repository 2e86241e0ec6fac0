"""A finished run at a rate of 1e-7: the curve is a straight line."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import tones


def make(folder):
    from tests.tools.doctor.setups.runs import compose, train_recipe

    run = folder / "run"
    more = ["model.optim.lr=1e-7", "trainer.max_steps=100"]
    train_recipe(compose("conformer", tones.manifests(folder), run, *more), run)
    return {"run": str(run)}


FAULT = Fault("after_rate_too_low", ("lr-too-low", "run-plateau"), "after", make)
