"""The vocabulary is set once more when training begins: the optimizer holds the old decoder."""

from nemo.collections.asr.models import EncDecCTCModel

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live


class Model(EncDecCTCModel):
    def on_train_start(self):
        super().on_train_start()
        self.decoder = self.from_config_dict(self.cfg.decoder)


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    model = live(folder, "transformer", cls=Model)["model"]
    return model, fit(model, folder, 60, callbacks)


def make(folder):
    from tests.tools.doctor.setups.runs import observed

    return observed(run)(folder)


FAULT = Fault("decoder_replaced_after_optimizer", ("not-in-optimizer",), "during", make, run)
