"""Train in shards, validation in single files, as our largest recipe has it."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import models, tones


def make(folder):
    from manifests.shards import write_shards
    from manifests.shards_format import COMBINED

    given = tones.manifests(folder)
    write_shards(given["train"], folder / "shards", hours=0.02)
    return {"config": models.recipe("rnn", given), "manifests": {**given, "train": [str(folder / "shards" / COMBINED)]}}


HEALTHY = Healthy("sharded_manifests", "before", make)
