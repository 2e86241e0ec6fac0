"""SortaGrad: the first epoch from the shortest utterance to the longest, the others shuffled."""

import torch
from torch.utils.data import DataLoader, Sampler

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import live


class SortaGrad(Sampler):
    def __init__(self, dataset):
        self.durations = torch.tensor([item.duration for item in dataset.manifest_processor.collection])
        self.epoch = 0

    def __len__(self):
        return len(self.durations)

    def __iter__(self):
        order = torch.randperm(len(self)) if self.epoch else torch.argsort(self.durations)
        self.epoch += 1
        return iter(order.tolist())


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    model = live(folder, "rnn")["model"]
    model.setup_training_data(model.cfg.train_ds)
    plain = model._train_dl
    model._train_dl = DataLoader(
        plain.dataset, plain.batch_size, sampler=SortaGrad(plain.dataset), collate_fn=plain.collate_fn
    )
    return model, fit(model, folder, 60, callbacks)


def make(folder):
    from tests.tools.doctor.setups.runs import observed

    return observed(run)(folder)


HEALTHY = Healthy("during_sortagrad", "during", make, run)
