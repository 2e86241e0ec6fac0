"""Test utterances are in train under other names, from a second download: other paths, the same samples and texts."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, tones


def make(folder):
    test = tones.corpus(folder, count=24, seed=9, name="test")
    copies = [
        {**tones.rewrite(row, tones.samples(row), folder / "again" / f"s{i}", suffix=".wav"), "utterance": f"again-{i}"}
        for i, row in enumerate(test)
    ]
    given = tones.manifests(folder, tones.corpus(folder, count=72) + copies)
    given["test"] = [tones.write(folder / "test.json", test)]
    return {"config": models.recipe("rnn", given), "manifests": given}


FAULT = Fault("leaked_copies", ("data-leakage",), "before", make)
