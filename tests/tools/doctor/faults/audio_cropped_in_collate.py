"""A collate function that cuts the audio to one second for batches of one shape, and leaves the texts whole."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    model = live(folder, "transformer")["model"]
    model.setup_training_data(model.cfg.train_ds)
    collate = model._train_dl.collate_fn

    def crop(items):
        audio, lengths, *more = collate(items)
        return audio[:, :16000], lengths.clamp(max=16000), *more

    model._train_dl.collate_fn = crop
    return model, fit(model, folder, 100, callbacks)


def make(folder):
    from tests.tools.doctor.setups.runs import observed

    return observed(run)(folder)


FAULT = Fault(
    "audio_cropped_in_collate", ("data-mismatched-text", "data-duration-wrong", "data-target-too-long"), "during", make,
    run
)
