"""A tokenizer from lowered texts, as NeMo's script makes it unless told otherwise, and manifests in capitals."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, tones


def make(folder):
    given = tones.manifests(folder)
    config = models.recipe("conformer", given, tokenizer=models.tokenizer(folder, given, 64))
    config["model"] = models.bpe(config["model"])
    for path in (given["train"][0], given["validation"][0]):
        tones.write(path, [{**row, "text": row["text"].upper()} for row in tones.read(path)])
    return {"config": config, "manifests": given}


FAULT = Fault(
    "tokenizer_of_lowered_texts", ("data-upper-case", "tokenizer-vocabulary", "data-characters"), "before", make
)
