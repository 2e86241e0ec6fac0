"""A head of cosines between frames and labels, as HuBERT's, whose temperature of 0.1 was left out.

No logit is above 1 or below -1, so that of 29 labels none gets a probability much above 0.2.
"""

from nemo.collections.asr.modules import ConvASRDecoder
from nemo.core.classes.common import typecheck
from torch.nn.functional import conv1d, log_softmax, normalize

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, models


class Decoder(ConvASRDecoder):
    cooled = 1.0

    @typecheck()
    def forward(self, encoder_output):
        cosines = conv1d(normalize(encoder_output, dim=1), normalize(self.decoder_layers[0].weight, dim=1))
        return log_softmax(cosines.transpose(1, 2) / self.cooled, dim=-1)


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    model = live(folder, "conv", decoder=models.decoder(48, _target_=f"{__name__}.Decoder"))["model"]
    return model, fit(model, folder, 100, callbacks)


def make(folder):
    from tests.tools.doctor.setups.runs import observed

    return observed(run)(folder)


FAULT = Fault("cosine_head_without_scale", ("run-plateau", "not-log-probs"), "during", make, run)
