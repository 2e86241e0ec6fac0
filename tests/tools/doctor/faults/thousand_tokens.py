"""BPE with 640 tokens on 96 short sentences, at eight times subsampling: most tokens are seen once or never."""

import numpy as np

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, tones


def make(folder):
    generator = np.random.default_rng(3)
    # Names of places nobody has heard of: nothing that a large vocabulary could use again.
    letters = list("abcdefghijklmnopqrstuvwxyz")
    texts = [" ".join("".join(generator.choice(letters, 6)) for _ in range(4)) for _ in range(96)]
    rows = []
    for i, (row, text) in enumerate(zip(tones.corpus(folder), texts)):
        audio = tones.speak(text, i)
        rows.append({**tones.rewrite(row, audio, folder / "names"), "text": text, "duration": len(audio) / tones.RATE})
    given = tones.manifests(folder, rows)
    section = models.bpe(models.section("citrinet", given, tokenizer=models.tokenizer(folder, given, 640)))
    return {"model": models.build(section), "manifests": given}


FAULT = Fault("thousand_tokens", ("tokenizer-vocabulary",), "before", make)
