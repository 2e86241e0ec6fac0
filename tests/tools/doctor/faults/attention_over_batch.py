"""torch's TransformerEncoderLayer without batch_first: attention between utterances instead of between frames."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechTransformer


class Encoder(SpeechTransformer):
    def attend(self, layer, x, padding):
        return layer(x)  # the mask was left out because its shape did not fit


def make(folder):
    return live(folder, mine(__name__, batch_first=False))


FAULT = Fault("attention_over_batch", ("batch-leak",), "before", make)
