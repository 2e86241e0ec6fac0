"""NeMo's QuartzNet-like encoder with a BPE vocabulary."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import models, tones


def make(folder):
    given = tones.manifests(folder)
    section = models.bpe(models.section("quartznet", given))
    section["tokenizer"] = models.tokenizer(folder, given, 48)
    return {"model": models.build(section), "manifests": given}


HEALTHY = Healthy("quartznet_bpe", "before", make)
