"""A finished run of a stock NeMo model with two orders of labels: good loss, and every word wrong.

The data set numbers the labels from a, the decoder from the space.
"""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, tones


def make(folder):
    import yaml

    from tests.tools.doctor.setups.runs import fit

    given = tones.manifests(folder)
    run = folder / "run"
    run.mkdir()
    section = models.section("conv", given)
    section["train_ds"]["labels"] = [*tones.LETTERS, " "]
    model = models.build(section)
    fit(model, run, 100, validate=True, val_check_interval=25, check_val_every_n_epoch=None)
    config = {"name": "mine", "model": section, "trainer": models.trainer(max_steps=100)}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return {"run": str(run)}


FAULT = Fault("after_labels_in_two_orders", ("label-order",), "after", make)
