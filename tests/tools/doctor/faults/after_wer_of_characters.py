"""A finished run of a stock NeMo model with `use_cer: true`: what is logged as val_wer counts characters."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, tones


def make(folder):
    import torch
    import yaml

    from tests.tools.doctor.setups.runs import fit

    given = tones.manifests(folder)
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    section = models.section("conv", given, use_cer=True)
    model = models.build(section)
    fit(model, run, 150, validate=True, val_check_interval=25, check_val_every_n_epoch=None)
    torch.save({"state_dict": model.state_dict(), "global_step": 150}, run / "checkpoints" / "last.ckpt")
    config = {"name": "mine", "model": section, "trainer": models.trainer(max_steps=150)}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return {"run": str(run)}


FAULT = Fault("after_wer_of_characters", ("metric-normalisation", "metric-averaged", "metric-not-collapsed"), "after",
              make)
