"""The dev manifest has the text of another toolkit's token file, letters with spaces between them."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, tones


def make(folder):
    given = tones.manifests(folder)
    rows = [{**row, "text": " ".join(row["text"].replace(" ", ""))} for row in tones.read(given["validation"][0])]
    tones.write(given["validation"][0], rows)
    return {"config": models.recipe("rnn", given), "manifests": given}


FAULT = Fault("dev_in_single_letters", ("metric-normalisation", "data-mismatched-text"), "before", make)
