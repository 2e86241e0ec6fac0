"""A finished run whose validation manifest got the next line's texts; train is right, and no word of dev is."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, tones


def make(folder):
    import yaml

    from tests.tools.doctor.setups.runs import fit

    given = tones.manifests(folder)
    dev = tones.read(given["validation"][0])
    texts = [row["text"] for row in dev]
    tones.write(given["validation"][0],
                [{**row, "text": text} for row, text in zip(dev, texts[1:] + texts[:1])])
    run = folder / "run"
    run.mkdir()
    section = models.section("rnn", given)
    model = models.build(section)
    fit(model, run, 120, validate=True, val_check_interval=24, check_val_every_n_epoch=None, enable_checkpointing=True)
    config = {"name": "mine", "model": section, "trainer": models.trainer(max_steps=120)}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return {"run": str(run)}


FAULT = Fault("after_dev_shifted_by_a_line", ("data-mismatched-text",), "after", make)
