"""The global batch of the 960 h recipe on a small corpus: the run has a handful of steps."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import tones


def make(folder):
    from tests.tools.doctor.setups.runs import compose

    given = tones.manifests(folder)
    cfg = compose("deepspeech2", given, folder / "run", "training.global_batch_seconds=6400")
    return {"config": cfg, "manifests": given}


FAULT = Fault("corpus_in_one_batch", ("batch-size",), "before", make)
