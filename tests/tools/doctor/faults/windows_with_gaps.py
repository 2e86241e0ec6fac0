"""Windows of 10 ms every 25 ms, the two numbers exchanged: three fifths of the audio are never read."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, models


def make(folder):
    encoder = {**models.ENCODERS["rnn"](), "strides": [1, 1]}
    return live(folder, encoder, preprocessor=models.preprocessor(window_size=0.01, window_stride=0.025))


FAULT = Fault("windows_with_gaps", ("features-bad",), "before", make)
