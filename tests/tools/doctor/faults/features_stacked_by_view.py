"""A preprocessor of one's own that takes (B, D, T) for (B, T, D) and views it as what the encoder wants."""

from nemo.collections.asr.modules import AudioToMelSpectrogramPreprocessor

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, models


class Preprocessor(AudioToMelSpectrogramPreprocessor):
    def get_features(self, input_signal, length):
        x, length = super().get_features(input_signal, length)
        B, D, T = x.shape
        return x.contiguous().view(B, T, D).transpose(1, 2), length


def make(folder):
    return live(folder, preprocessor=models.preprocessor() | {"_target_": f"{__name__}.Preprocessor"})


FAULT = Fault("features_stacked_by_view", ("time-scrambled", "features-bad"), "before", make)
