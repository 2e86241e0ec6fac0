"""BatchNorm over all frames of a padded batch: a third of what it averages is nothing."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechConv


class Encoder(SpeechConv):
    def normalise(self, norm, x, valid):
        return norm(x)


def make(folder):
    return live(folder, mine(__name__), corpus={"words": (1, 12)})


FAULT = Fault("padding_in_batchnorm", ("norm-padding", "padding-leak"), "before", make)
