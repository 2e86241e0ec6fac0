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


def make(folder):
    given = tones.manifests(folder)
    return {"model": models.build(models.section("conv", given), cls=Model), "manifests": given}


FAULT = Fault("wer_averaged_over_batches", ("metric-averaged",), "before", make)
