"""A table of 200 learned positions: what is longer than four seconds ends the training."""

import torch
from torch import nn

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechTransformer


class Encoder(SpeechTransformer):
    def __init__(self, feat_in, **more):
        super().__init__(feat_in, **more)
        self.table = nn.Parameter(0.02 * torch.randn(1, 200, self._feat_out))

    def attend(self, layer, x, padding):
        return layer(x + self.table[:, : x.shape[1]], src_key_padding_mask=padding)


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    model = made(folder)["model"]
    return model, fit(model, folder, 100, callbacks)


def made(folder):
    return live(folder, mine(__name__), corpus={"words": (2, 12)})


FAULT = Fault("positions_too_short", ("model-does-not-build",), "before", made, run)
