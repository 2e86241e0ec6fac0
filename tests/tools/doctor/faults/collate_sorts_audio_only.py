"""A collate function that sorts the audio by length for packing and leaves the transcripts where they were."""

import torch

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    model = live(folder, "transformer")["model"]
    model.setup_training_data(model.cfg.train_ds)
    collate = model._train_dl.collate_fn

    def sort(items):
        audio, lengths, texts, text_lengths, *more = collate(items)
        order = torch.argsort(lengths, descending=True)
        return audio[order], lengths[order], texts, text_lengths, *more

    model._train_dl.collate_fn = sort
    return model, fit(model, folder, 60, callbacks)


def make(folder):
    from tests.tools.doctor.setups.runs import observed

    return observed(run)(folder)


FAULT = Fault("collate_sorts_audio_only", ("data-mismatched-text", "run-plateau"), "during", make, run)
