"""The loss with blank 0, torch's default, while NeMo's decoder has the blank last: the space is the loss's blank."""

from nemo.collections.asr.losses.ctc import CTCLoss
from nemo.collections.asr.models import EncDecCTCModel

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live


class Model(EncDecCTCModel):
    def __init__(self, cfg, trainer=None):
        super().__init__(cfg=cfg, trainer=trainer)
        self.loss = CTCLoss(num_classes=0, zero_infinity=True, reduction="mean_batch")


FAULT = Fault("blank_zero_in_the_loss", ("blank-index",), "before", lambda folder: live(folder, cls=Model))
