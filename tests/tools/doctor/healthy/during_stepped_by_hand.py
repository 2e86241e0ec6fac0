"""Manual optimization as it should be: two batches a step, clipped, and the schedule stepped with the optimizer."""

from nemo.collections.asr.models import EncDecCTCModel

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import live


class Model(EncDecCTCModel):
    def __init__(self, cfg, trainer=None):
        super().__init__(cfg=cfg, trainer=trainer)
        self.automatic_optimization = False

    def training_step(self, batch, batch_nb):
        output = super().training_step(batch, batch_nb)
        optimizer = self.optimizers()
        self.manual_backward(output["loss"] / 2)
        if batch_nb % 2:
            self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()
        return output


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    model = live(folder, "rnn", cls=Model)["model"]
    model.cfg.train_ds.batch_size = 4
    return model, fit(model, folder, 60, callbacks, gradient_clip_val=None)


def make(folder):
    from tests.tools.doctor.setups.runs import observed

    return observed(run)(folder)


HEALTHY = Healthy("during_stepped_by_hand", "during", make, run)
