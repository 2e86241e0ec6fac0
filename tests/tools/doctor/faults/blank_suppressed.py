"""A decoder that pushes the blank down by 30 before the softmax, since "the model only ever wrote blanks"."""

from nemo.collections.asr.modules import ConvASRDecoder
from nemo.core.classes.common import typecheck

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, models


class Decoder(ConvASRDecoder):
    @typecheck()
    def forward(self, encoder_output):
        scores = self.decoder_layers(encoder_output).transpose(1, 2)
        scores[..., -1] = scores[..., -1] - 30.0
        return scores.log_softmax(dim=-1)


def make(folder):
    return live(folder, decoder=models.decoder(48) | {"_target_": f"{__name__}.Decoder"})


FAULT = Fault("blank_suppressed", ("blank-index", "not-log-probs"), "before", make)
