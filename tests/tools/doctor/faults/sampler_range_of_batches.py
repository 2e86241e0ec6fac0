"""A sampler of one's own that draws utterances from the number of batches: most of the corpus is never seen."""

import torch
from torch.utils.data import DataLoader, Sampler

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live


class Draws(Sampler):
    """Utterances at random, with replacement, an epoch's worth."""

    def __init__(self, loader):
        self.count, self.size = len(loader), loader.batch_size

    def __len__(self):
        return self.count * self.size

    def __iter__(self):
        return iter(torch.randint(self.count, (len(self),)).tolist())


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    model = live(folder, "conv")["model"]
    model.setup_training_data(model.cfg.train_ds)
    plain = model._train_dl
    model._train_dl = DataLoader(plain.dataset, plain.batch_size, sampler=Draws(plain), collate_fn=plain.collate_fn)
    return model, fit(model, folder, 96, callbacks, validate=True, val_check_interval=24, check_val_every_n_epoch=None)


def make(folder):
    from tests.tools.doctor.setups.runs import observed

    return observed(run)(folder)


FAULT = Fault("sampler_range_of_batches", ("data-filtered", "run-overfitting", "data-order"), "during", make, run)
