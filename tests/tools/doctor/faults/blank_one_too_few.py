"""The blank counted without the space: the loss takes the apostrophe for the blank."""

from nemo.collections.asr.losses.ctc import CTCLoss

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, tones


def make(folder):
    given = live(folder)
    letters = [label for label in tones.LABELS if label != " "]
    given["model"].loss = CTCLoss(num_classes=len(letters), zero_infinity=True, reduction="mean_batch")
    return given


FAULT = Fault("blank_one_too_few", ("blank-index",), "before", make)
