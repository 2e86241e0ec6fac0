"""Our DeepSpeech2 recipe, tiny, by its composed configuration."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import tones


def make(folder):
    from tests.tools.doctor.setups.runs import compose

    given = tones.manifests(folder)
    return {"config": compose("deepspeech2", given, folder, "training.epochs=80"), "manifests": given}


HEALTHY = Healthy("recipe_deepspeech2", "before", make)
