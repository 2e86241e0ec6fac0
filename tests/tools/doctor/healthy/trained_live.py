"""A trained model: convolutions that have learned their corpus."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import live


def make(folder):
    from tests.tools.doctor.setups import tones
    from tests.tools.doctor.setups.learning import learn

    given = live(folder, "conv")
    learn(given["model"], tones.read(given["manifests"]["train"][0]), 150)
    return given


HEALTHY = Healthy("trained_live", "before", make)
