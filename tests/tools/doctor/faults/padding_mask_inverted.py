"""The padding mask the wrong way round: True on what may be seen."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechTransformer


class Encoder(SpeechTransformer):
    def attend(self, layer, x, padding):
        return layer(x, src_key_padding_mask=~padding)


FAULT = Fault(
    "padding_mask_inverted", ("padding-leak", "explodes", "length-ignored", "output-constant"), "before",
    lambda folder: live(folder, mine(__name__)),
)
