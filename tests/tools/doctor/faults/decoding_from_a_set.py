"""The decoding was built again from a set of the characters, whose order is another in each process."""

from nemo.collections.asr.parts.submodules.ctc_decoding import CTCDecoding
from omegaconf import OmegaConf

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, tones


def make(folder):
    given = live(folder)
    order = sorted(set(tones.LABELS), key=lambda c: (ord(c) * 37) % 101)  # what a set gives, made repeatable
    model = given["model"]
    model.decoding = CTCDecoding(OmegaConf.create({"strategy": "greedy_batch"}), vocabulary=order)
    model.wer.decoding = model.decoding
    return given


FAULT = Fault("decoding_from_a_set", ("label-order",), "before", make)
