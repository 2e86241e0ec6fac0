"""A trained stock model in a .nemo file."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import live


def make(folder):
    from tests.tools.doctor.setups import tones
    from tests.tools.doctor.setups.learning import learn

    given = live(folder, "quartznet")
    learn(given["model"], tones.read(given["manifests"]["train"][0]), 150)
    given["model"].save_to(str(folder / "trained.nemo"))
    return {"model": str(folder / "trained.nemo"), "manifests": given["manifests"]}


HEALTHY = Healthy("trained_nemo_file", "before", make)
