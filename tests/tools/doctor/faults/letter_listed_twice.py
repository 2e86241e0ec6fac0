"""Labels put together by hand, with an "e" twice: one of its outputs is never a target, and all decode alike."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, tones

TWICE = [*tones.LABELS, "e"]


def make(folder):
    given = tones.manifests(folder)
    section = models.section("rnn", given, labels=list(TWICE), decoder=models.decoder(48, TWICE))
    section["train_ds"]["labels"] = section["validation_ds"]["labels"] = list(TWICE)
    return {"model": models.build(section), "manifests": given}


FAULT = Fault("letter_listed_twice", ("label-order", "tokenizer-vocabulary"), "before", make)
