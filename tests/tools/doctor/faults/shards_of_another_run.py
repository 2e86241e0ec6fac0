"""The tar files were written anew, in another order; the manifest of all rows is that of the first time."""

import shutil

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, tones


def make(folder):
    from manifests.shards import write_shards
    from manifests.shards_format import COMBINED

    given = tones.manifests(folder)
    write_shards(given["train"], folder / "shards", hours=0.02)
    write_shards(given["train"], folder / "again", hours=0.02, seed=1)
    shutil.copy(folder / "shards" / COMBINED, folder / "again" / COMBINED)
    return {"config": models.recipe("rnn", given), "manifests": {**given, "train": [str(folder / "again" / COMBINED)]}}


FAULT = Fault("shards_of_another_run", ("data-missing-audio",), "before", make)
