"""Manual optimization: Lightning leaves the schedule to the training step then, which steps the optimizer alone.

The rate stays that of the first step of the warm-up.
"""

from nemo.collections.asr.models import EncDecCTCModel

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, models


class Model(EncDecCTCModel):
    def __init__(self, cfg, trainer=None):
        super().__init__(cfg=cfg, trainer=trainer)
        self.automatic_optimization = False

    def training_step(self, batch, batch_nb):
        output = super().training_step(batch, batch_nb)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(output["loss"])
        self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
        optimizer.step()
        return output


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    model = live(folder, cls=Model, optim=models.optim(sched={"warmup_steps": 20}))["model"]
    return model, fit(model, folder, 80, callbacks, gradient_clip_val=None)


def make(folder):
    from tests.tools.doctor.setups.runs import observed

    return observed(run)(folder)


FAULT = Fault(
    "scheduler_forgotten_in_manual_optimization", ("schedule-per-epoch", "lr-too-low", "run-plateau"), "during", make,
    run,
)
