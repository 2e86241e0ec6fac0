"""A finished healthy run of our DeepSpeech2."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import tones


def make(folder):
    from tests.tools.doctor.setups.runs import compose, train_recipe

    run = folder / "run"
    train_recipe(compose("deepspeech2", tones.manifests(folder), run, "trainer.max_steps=300"), run)
    return {"run": str(run)}


HEALTHY = Healthy("after_deepspeech2", "after", make)
