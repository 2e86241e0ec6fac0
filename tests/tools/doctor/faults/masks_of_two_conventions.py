"""A Conformer whose blocks are handed a mask that is True on real frames, where they hide what is True."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, models


def make(folder):
    from recipes import allow_targets

    allow_targets("tools.histories.")
    encoder = {"_target_": "tools.histories.conformer.InvertedMask", "feat_in": models.FEATURES, "n_layers": 2,
               "d_model": 48, "n_heads": 4, "conv_kernel_size": 9, "subsampling_conv_channels": 24, "dropout": 0.0,
               "dropout_pre_encoder": 0.0}
    return live(folder, encoder, width=48)


FAULT = Fault("masks_of_two_conventions", ("padding-leak",), "before", make)
