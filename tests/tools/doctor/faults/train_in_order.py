"""`shuffle: false`, from the section of the validation, and a manifest that was written speaker by speaker."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, tones


def make(folder):
    rows = tones.corpus(folder)
    rows = [{**row, "speaker": f"speaker {12 * i // len(rows)}"} for i, row in enumerate(rows)]
    given = {"train": [tones.write(folder / "train.json", rows)], **{
        role: paths for role, paths in tones.manifests(folder / "dev").items() if role != "train"}}
    section = models.section("rnn", given, **models.datasets(given, batch_size=8))
    section["train_ds"]["shuffle"] = False
    return {"config": {"model": section}, "manifests": given}


FAULT = Fault("train_in_order", ("data-order",), "before", make)
