"""A finished run of our Conformer on two views of each batch at other tempi, with a CTC loss at an inner layer too."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.healthy import recipe_intermediate_ctc, recipe_views_tempo_warp
from tests.tools.doctor.setups import tones

SWITCHES = (*recipe_views_tempo_warp.SWITCHES, *recipe_intermediate_ctc.SWITCHES)


def make(folder):
    from tests.tools.doctor.setups.runs import compose, train_recipe

    run = folder / "run"
    train_recipe(compose("conformer", tones.manifests(folder), run, "trainer.max_steps=240", *SWITCHES), run)
    return {"run": str(run)}


HEALTHY = Healthy("after_two_views", "after", make)
