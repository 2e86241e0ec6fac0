"""A finished run of an encoder whose last hidden layer has a softmax for its activation."""

import torch

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import mine, models, tones
from tests.tools.doctor.setups.encoders import SpeechRNN


class Encoder(SpeechRNN):
    def project(self, x):
        return torch.softmax(self.norm3(self.out(x)), dim=-1)


def make(folder):
    import yaml

    from tests.tools.doctor.setups.runs import fit

    given = tones.manifests(folder)
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    section = models.section(mine(__name__), given)
    model = models.build(section)
    fit(model, run, 100, validate=True, val_check_interval=25, check_val_every_n_epoch=None)
    torch.save({"state_dict": model.state_dict(), "global_step": 100}, run / "checkpoints" / "last.ckpt")
    config = {"name": "mine", "model": section, "trainer": models.trainer(max_steps=100)}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    return {"run": str(run)}


FAULT = Fault("after_softmax_as_activation", ("vanishes", "run-plateau"), "after", make)
