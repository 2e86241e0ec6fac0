"""The start of a run of our DeepSpeech2 on two views of each batch, at other tempi and with other vocal tracts."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.healthy.recipe_views_tempo_warp import SWITCHES
from tests.tools.doctor.setups import tones


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import compose, train_recipe

    cfg = compose("deepspeech2", tones.manifests(folder), folder / "run", "trainer.max_steps=40", *SWITCHES)
    return train_recipe(cfg, folder / "run", callbacks), None


def make(folder):
    from tools.doctor import Doctor

    doctor = Doctor(folder=folder / "run")
    run(folder, [doctor])
    return doctor.report()


HEALTHY = Healthy("during_views_tempo_warp", "during", make, run)
