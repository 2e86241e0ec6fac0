"""A finished run that was warming up for all of its steps."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import tones


def make(folder):
    from tests.tools.doctor.setups.runs import compose, train_recipe

    run = folder / "run"
    cfg = compose("deepspeech2", tones.manifests(folder), run, "model.optim.lr=2e-4", "trainer.max_steps=80",
                  "training.warmup_share=0.99")
    train_recipe(cfg, run)
    return {"run": str(run)}


FAULT = Fault("after_warmup_longer", ("warmup-too-long", "lr-too-low"), "after", make)
