"""Dropout 0.9, by somebody who thought of the probability to keep a unit."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import models, written


def make(folder):
    off = {key: 0.9 for key in ("dropout", "dropout_pre_encoder", "dropout_att")}
    return written(folder, models.ENCODERS["conformer"]() | off)


FAULT = Fault("dropout_as_keep_probability", ("dropout-range",), "before", make)
