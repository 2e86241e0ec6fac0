"""SpecAugment of the large model on 32 mel bins: two masks of up to 27 of them, ten of a tenth of the time each."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, written


def make(folder):
    masks = models.spec_augment(freq_masks=2, freq_width=27, time_masks=10, time_width=0.1)
    return written(folder, "conv", spec_augment=masks)


FAULT = Fault("masks_for_eighty_bins", ("augmentation-too-strong",), "before", make)
