"""The data set's labels begin with a blank, as in other code bases: every target is one too high."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, tones


def make(folder):
    given = tones.manifests(folder)
    section = models.section("rnn", given)
    section["train_ds"]["labels"] = ["_", *tones.LABELS]
    return {"model": models.build(section), "manifests": given}


FAULT = Fault("labels_with_blank_first", ("label-order", "blank-index"), "before", make)
