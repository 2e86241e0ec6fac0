"""A healthy run of our Conformer after its first 30 steps."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import tones


def make(folder):
    from tests.tools.doctor.setups.runs import compose, train_recipe

    run = folder / "run"
    more = ["trainer.max_steps=30", "trainer.log_every_n_steps=2"]
    train_recipe(compose("conformer", tones.manifests(folder), run, *more), run)
    return {"run": str(run)}


HEALTHY = Healthy("after_early", "after", make)
