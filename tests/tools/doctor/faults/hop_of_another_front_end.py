"""A front end of one's own that counts frames of 12.5 ms and makes frames of 10 ms: a fifth of each end is cut off."""

from nemo.collections.asr.modules import AudioToMelSpectrogramPreprocessor

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, models


class Preprocessor(AudioToMelSpectrogramPreprocessor):
    def get_features(self, input_signal, length):
        features, _ = super().get_features(input_signal, length)
        return features, length // 200 + 1


def make(folder):
    return live(folder, preprocessor=models.preprocessor() | {"_target_": f"{__name__}.Preprocessor"})


FAULT = Fault("hop_of_another_front_end", ("length-mismatch", "features-bad"), "before", make)
