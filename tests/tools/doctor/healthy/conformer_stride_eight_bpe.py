"""NeMo's Conformer at eight times subsampling with BPE tokens, which fit."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import models, tones


def make(folder):
    given = tones.manifests(folder, pace=0.7)
    encoder = models.ENCODERS["conformer"]() | {"subsampling_factor": 8}
    section = models.bpe(models.section(encoder, given, tokenizer=models.tokenizer(folder, given, 128)))
    return {"model": models.build(section), "manifests": given}


HEALTHY = Healthy("conformer_stride_eight_bpe", "before", make)
