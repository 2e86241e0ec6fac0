"""Our DeepSpeech2 recipe with two views of each batch held together, other tempi and other vocal tracts."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import tones

SWITCHES = ("model.consistency_weight=0.2", "model.tempo=0.1", "model.spec_augment.warp=0.1")


def make(folder):
    from tests.tools.doctor.setups.runs import compose

    given = tones.manifests(folder)
    return {"config": compose("deepspeech2", given, folder, "training.epochs=80", *SWITCHES), "manifests": given}


HEALTHY = Healthy("recipe_views_tempo_warp", "before", make)
