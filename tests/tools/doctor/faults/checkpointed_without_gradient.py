"""Activation checkpointing, the reentrant kind, around an encoder whose input asks for no gradient: it gets none."""

from torch.utils.checkpoint import checkpoint

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, mine
from tests.tools.doctor.setups.encoders import SpeechRNN


class Encoder(SpeechRNN):
    def encode(self, x, length):
        return checkpoint(super().encode, x, length, use_reentrant=True)


def run(folder, callbacks):
    from tests.tools.doctor.setups.runs import fit

    model = live(folder, mine(__name__))["model"]
    return model, fit(model, folder, 100, callbacks)


def make(folder):
    from tests.tools.doctor.setups.runs import observed

    return observed(run)(folder)


FAULT = Fault("checkpointed_without_gradient", ("no-gradient", "frozen"), "during", make, run)
