"""Texts that went through a display routine for right-to-left scripts: their letters stand as on the screen."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, tones


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    given = tones.manifests(folder)
    for path in (given["train"][0], given["validation"][0]):
        tones.write(path, [{**row, "text": row["text"][::-1]} for row in tones.read(path)])
    model = models.build(models.section("rnn", given))
    return model, fit(model, folder, 80, callbacks)


def make(folder):
    from tests.tools.doctor.setups.runs import observed

    return observed(run)(folder)


FAULT = Fault(
    "transcripts_in_visual_order", ("data-mismatched-text", "time-scrambled", "run-plateau"), "during", make, run
)
