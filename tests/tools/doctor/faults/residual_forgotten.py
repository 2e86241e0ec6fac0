"""Transformer layers that hand on what a sub-layer gives, without what went into it, twelve deep."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechTransformer


class Encoder(SpeechTransformer):
    def attend(self, layer, x, padding):
        x = layer._sa_block(layer.norm1(x), None, padding)
        return layer._ff_block(layer.norm2(x))


FAULT = Fault("residual_forgotten", ("vanishes", "output-constant", "time-scrambled"), "before",
              lambda folder: live(folder, mine(__name__, layers=12)))
