"""Parameter groups left over from a fine-tuning: the encoder learns at a rate of 1e-8."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import written


def make(folder):
    return written(folder, optim_param_groups={"encoder": {"lr": 1e-8}, "decoder": {}})


FAULT = Fault("encoder_group_of_another_rate", ("lr-too-low", "frozen"), "before", make)
