"""The optimizer's parameter groups name the decoder alone."""

from nemo.collections.asr.models import EncDecCTCModel

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live


class Model(EncDecCTCModel):
    def setup_optimizer_param_groups(self):
        self._optimizer_param_groups = [{"params": list(self.decoder.parameters())}]


FAULT = Fault("only_the_decoder_optimized", ("not-in-optimizer",), "before", lambda folder: live(folder, cls=Model))
