"""A run that was cut off by its time limit after 20 of 2000 steps: nothing is wrong but that it is early."""

from lightning.pytorch import Callback

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import tones


class TimeLimit(Callback):
    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        trainer.should_stop = trainer.global_step >= 20


def make(folder):
    from tests.tools.doctor.setups.runs import compose, train_recipe

    run = folder / "run"
    cfg = compose("deepspeech2", tones.manifests(folder), run, "trainer.max_steps=2000", "trainer.log_every_n_steps=2")
    train_recipe(cfg, run, [TimeLimit()])
    return {"run": str(run)}


FAULT = Fault("after_cut_off", ("run-early",), "after", make)
