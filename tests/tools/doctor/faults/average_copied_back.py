"""A running average of the weights that is copied into the model after each step, and never taken out again."""

import torch
from lightning.pytorch import Callback

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, tones


class Average(Callback):
    def on_fit_start(self, trainer, model):
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def on_train_batch_end(self, trainer, model, *_):
        for name, p in model.named_parameters():
            p.copy_(self.weights[name].mul_(0.999).add_(p, alpha=0.001))


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    given = tones.manifests(folder)
    model = models.build(models.section("rnn", given, width=32, **models.datasets(given, batch_size=8)))
    return model, fit(model, folder, 40, [Average(), *callbacks])


def make(folder):
    from tests.tools.doctor.setups.runs import observed

    return observed(run)(folder)


FAULT = Fault("average_copied_back", ("weights-not-moved",), "during", make, run)
