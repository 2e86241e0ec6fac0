"""A data set with `bos_id` and `eos_id`, as attention wants it: every target begins and ends with a mark."""

from nemo.collections.asr.models import EncDecCTCModel

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live


class Model(EncDecCTCModel):
    def _setup_dataloader_from_config(self, config):
        loader = super()._setup_dataloader_from_config(config)
        loader.dataset.manifest_processor.bos_id, loader.dataset.manifest_processor.eos_id = 1, 2
        return loader


FAULT = Fault("start_and_end_in_the_targets", ("data-mismatched-text", "label-order"), "before",
              lambda folder: live(folder, cls=Model))
