"""`precision: 16-true`: weights, optimizer and loss in fp16, whose smallest number is far above Adam's 1e-8."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import written


def make(folder):
    return written(folder, "conv", trainer={"precision": "16-true", "accelerator": "gpu"})


FAULT = Fault("half_precision_throughout", ("precision-overflow",), "before", make)
