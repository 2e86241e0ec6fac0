"""A softmax at the end of the layers and log_softmax after it: no symbol can ever get more than 9 percent."""

from nemo.collections.asr.modules import ConvASRDecoder
from nemo.core.classes.common import typecheck

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, models


class Decoder(ConvASRDecoder):
    @typecheck()
    def forward(self, encoder_output):
        scores = self.decoder_layers(encoder_output).transpose(1, 2).softmax(dim=-1)
        return scores.log_softmax(dim=-1)


def make(folder):
    return live(folder, decoder=models.decoder(48) | {"_target_": f"{__name__}.Decoder"})


FAULT = Fault("softmax_then_log_softmax", ("not-log-probs",), "before", make)
