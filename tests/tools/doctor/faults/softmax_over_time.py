"""log_softmax with dim=1 on (B, T, V): probabilities sum to one over time."""

from nemo.collections.asr.modules import ConvASRDecoder
from nemo.core.classes.common import typecheck

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, models


class Decoder(ConvASRDecoder):
    @typecheck()
    def forward(self, encoder_output):
        return self.decoder_layers(encoder_output).transpose(1, 2).log_softmax(dim=1)


def make(folder):
    return live(folder, decoder=models.decoder(48) | {"_target_": f"{__name__}.Decoder"})


FAULT = Fault("softmax_over_time", ("softmax-axis", "not-log-probs"), "before", make)
