"""Log-probs clamped at -5 "against infinities": below it they sum to more than 1 and have no gradient."""

from nemo.collections.asr.modules import ConvASRDecoder
from nemo.core.classes.common import typecheck

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, models


class Decoder(ConvASRDecoder):
    @typecheck()
    def forward(self, encoder_output):
        return self.decoder_layers(encoder_output).transpose(1, 2).log_softmax(dim=-1).clamp(min=-5.0)


def make(folder):
    return live(folder, decoder=models.decoder(48) | {"_target_": f"{__name__}.Decoder"})


FAULT = Fault("log_probs_clamped", ("not-log-probs",), "before", make)
