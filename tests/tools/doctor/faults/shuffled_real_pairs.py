"""Real speech whose two lists, audio and texts, were sorted by different keys."""

import pytest

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, tones


def make(folder):
    rows = tones.real()
    if rows is None:
        pytest.skip("real LibriSpeech sample ../shared/librispeech/sample is not on this machine")
    texts = sorted(row["text"] for row in rows)
    given = {"train": [tones.write(folder / "train.json", [{**r, "text": t} for r, t in zip(rows, texts)])]}
    return {"config": models.recipe("rnn", given), "manifests": given}


FAULT = Fault("shuffled_real_pairs", ("data-mismatched-text",), "before", make)
