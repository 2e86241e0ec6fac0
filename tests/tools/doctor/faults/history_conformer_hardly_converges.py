"""History: a Conformer that converges badly even on one batch.

NeMo's own schedule, Noam with 10,000 steps of warm-up for a global batch of 2048, on eight utterances of LibriSpeech
and 60 steps: the rate never leaves 1e-5.
"""

import pytest

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, tones


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    rows = tones.real()
    if rows is None:
        pytest.skip("real LibriSpeech sample ../shared/librispeech/sample is not on this machine")
    given = {"train": [tones.write(folder / "train.json", sorted(rows, key=lambda row: row["duration"])[:8])]}
    schedule = {"name": "NoamAnnealing", "d_model": 48, "warmup_steps": 10000, "warmup_ratio": None, "min_lr": 1e-6}
    optim = {"name": "adamw", "lr": 2.0, "betas": [0.9, 0.98], "weight_decay": 1e-3, "sched": schedule}
    model = models.build(models.section("conformer", given, optim=optim, **models.datasets(given, batch_size=8)))
    return model, fit(model, folder, 60, callbacks)


def make(folder):
    from tests.tools.doctor.setups.runs import observed

    return observed(run)(folder)


FAULT = Fault("history_conformer_hardly_converges", ("warmup-too-long", "lr-too-low"), "during", make, run)
