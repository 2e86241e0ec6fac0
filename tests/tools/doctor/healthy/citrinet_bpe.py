"""BPE with 64 tokens on a Citrinet of stride 4, a live model."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import models, tones


def make(folder):
    given = tones.manifests(folder)
    section = models.bpe(models.section("citrinet", given, tokenizer=models.tokenizer(folder, given, 64)))
    return {"model": models.build(section), "manifests": given}


HEALTHY = Healthy("citrinet_bpe", "before", make)
