"""SpecAugment called in a forward of one's own that does not ask for the mode: evaluation is masked too."""

from nemo.collections.asr.models import EncDecCTCModel

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, models


class Model(EncDecCTCModel):
    def forward(self, input_signal=None, input_signal_length=None, processed_signal=None, processed_signal_length=None):
        if processed_signal is None:
            processed_signal, processed_signal_length = self.preprocessor(
                input_signal=input_signal, length=input_signal_length
            )
            if self.spec_augmentation is not None and not self.training:
                processed_signal = self.spec_augmentation(
                    input_spec=processed_signal, length=processed_signal_length
                )
        return super().forward(processed_signal=processed_signal, processed_signal_length=processed_signal_length)


def make(folder):
    masks = models.spec_augment(freq_masks=2, freq_width=6, time_masks=4, time_width=0.05)
    return live(folder, "transformer", cls=Model, spec_augment=masks)


FAULT = Fault("masks_at_all_times", ("train-eval-differ", "augmentation-too-strong"), "before", make)
