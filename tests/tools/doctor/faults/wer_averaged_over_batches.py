"""WER as the mean of the batches' WERs: a batch of one short utterance counts as much as one of sixteen."""

import torch
from nemo.collections.asr.models import EncDecCTCModel

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, tones


class Model(EncDecCTCModel):
    def multi_validation_epoch_end(self, outputs, dataloader_idx=0):
        loss = torch.stack([x["val_loss"] for x in outputs]).mean()
        wer = torch.stack([x["val_wer_num"] / x["val_wer_denom"] for x in outputs]).mean()
        return {"val_loss": loss, "val_wer": wer, "log": {"val_loss": loss, "val_wer": wer}}


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    given = tones.manifests(folder)
    dev = tones.corpus(folder, count=12, seed=7, name="dev", words=(5, 9))
    dev += tones.corpus(folder, count=5, seed=8, name="short", words=(1, 2))
    given["validation"] = [tones.write(folder / "dev.json", dev)]
    model = models.build(models.section("conv", given, **models.datasets(given, batch_size=12)), cls=Model)
    return model, fit(model, folder, 60, callbacks, validate=True, val_check_interval=20, check_val_every_n_epoch=None)


def make(folder):
    from tests.tools.doctor.setups.runs import observed

    return observed(run)(folder)


FAULT = Fault("wer_averaged_over_batches", ("metric-averaged",), "during", make, run)
