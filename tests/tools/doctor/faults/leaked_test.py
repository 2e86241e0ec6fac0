"""Train was built from all subsets, test included."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, tones


def make(folder):
    test = tones.corpus(folder, count=24, seed=9, name="test")
    given = tones.manifests(folder, tones.corpus(folder, count=72) + test)
    given["test"] = [tones.write(folder / "test.json", test)]
    return {"config": models.recipe("rnn", given), "manifests": given}


FAULT = Fault("leaked_test", ("data-leakage",), "before", make)
