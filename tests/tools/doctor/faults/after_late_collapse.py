"""A run that had learned until somebody raised the rate fiftyfold in the middle, "to get it off the plateau"."""

from lightning.pytorch import Callback

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import tones


class Impatience(Callback):
    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        if trainer.global_step >= 150:
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = 0.2


def make(folder):
    from tests.tools.doctor.setups.runs import compose, train_recipe

    run = folder / "run"
    cfg = compose("conformer", tones.manifests(folder), run, "trainer.max_steps=220", "training.validations=11")
    train_recipe(cfg, run, [Impatience()])
    return {"run": str(run)}


FAULT = Fault("after_late_collapse", ("lr-too-high", "run-diverged", "run-collapse-blank"), "after", make)
