"""A decoder of one's own that returns scores, as for cross-entropy; CTC wants log-probabilities."""

from nemo.collections.asr.modules import ConvASRDecoder
from nemo.core.classes.common import typecheck

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, models


class Decoder(ConvASRDecoder):
    @typecheck()
    def forward(self, encoder_output):
        return self.decoder_layers(encoder_output).transpose(1, 2)


def make(folder):
    return live(folder, decoder=models.decoder(48) | {"_target_": f"{__name__}.Decoder"})


FAULT = Fault("log_softmax_missing", ("not-log-probs",), "before", make)
