"""A run on a cluster with a time limit: each job leaves a checkpoint, and the next one starts from nothing again."""

from lightning.pytorch import Callback

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, tones


class TimeLimit(Callback):
    def __init__(self, steps: int):
        self.steps = steps

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step >= self.steps:
            trainer.should_stop = True


def make(folder):
    import yaml

    from tests.tools.doctor.setups.runs import fit

    given = tones.manifests(folder)
    run = folder / "run"
    run.mkdir()
    section = models.section("rnn", given)
    for _ in range(4):
        fit(models.build(section), run, 120, [TimeLimit(24)], enable_checkpointing=True)
    config = {"name": "mine", "model": section, "trainer": models.trainer(max_steps=120)}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return {"run": str(run)}


FAULT = Fault("after_each_job_from_the_start", ("run-ended", "run-plateau"), "after", make)
