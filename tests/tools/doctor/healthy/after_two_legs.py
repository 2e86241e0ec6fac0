"""A finished run in two legs, the second resumed from the first one's checkpoint: two logs, one training."""

from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import models, tones

STEPS = 120


class TimeLimit(Callback):
    def __init__(self, steps: int):
        self.steps = steps

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step >= self.steps:
            trainer.should_stop = True


def leg(section, run, until: int, start=None):
    seed_everything(0, verbose=False)
    model = models.build(section)
    keep = ModelCheckpoint(run / "checkpoints", save_last=True, every_n_train_steps=12)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=STEPS, gradient_clip_val=1.0, log_every_n_steps=5,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, val_check_interval=24,
        check_val_every_n_epoch=None, logger=CSVLogger(run), callbacks=[TimeLimit(until), keep],
    )
    model.set_trainer(trainer)
    model.setup_training_data(model.cfg.train_ds)
    model.setup_multiple_validation_data(model.cfg.validation_ds)
    trainer.fit(model, ckpt_path=start)


def make(folder):
    import yaml

    given = tones.manifests(folder)
    run = folder / "run"
    run.mkdir()
    section = models.section("rnn", given)
    leg(section, run, 60)
    leg(section, run, STEPS, str(run / "checkpoints" / "last.ckpt"))
    config = {"name": "mine", "model": section, "trainer": models.trainer(max_steps=STEPS)}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return {"run": str(run)}


HEALTHY = Healthy("after_two_legs", "after", make)
