"""Our DeepSpeech2 recipe, tiny, on real speech."""

import pytest

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import tones


def make(folder):
    from tests.tools.doctor.setups.runs import compose

    rows = tones.real()
    if rows is None:
        pytest.skip("real LibriSpeech sample ../shared/librispeech/sample is not on this machine")
    given = {"train": [tones.write(folder / "train.json", rows)],
             "validation": [tones.write(folder / "dev.json", tones.real("train-clean-100"))]}
    more = ["corpus.max_duration=20", "training.epochs=200", "corpus.bucket_duration_bins=[8.0]"]
    return {"config": compose("deepspeech2", given, folder, *more), "manifests": given}


HEALTHY = Healthy("real_recipe", "before", make)
