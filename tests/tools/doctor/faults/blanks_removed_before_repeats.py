"""Greedy decoding of one's own that takes out the blanks first and merges repeats then: no letter is ever doubled."""

from itertools import groupby

from nemo.collections.asr.parts.submodules.ctc_decoding import CTCDecoding

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live
from tests.tools.doctor.setups.tones import LABELS


class Decoding(CTCDecoding):
    def decode_hypothesis(self, hypotheses_list, fold_consecutive):
        for hypothesis in hypotheses_list:
            path = [int(label) for label in hypothesis.y_sequence[: int(hypothesis.length)]]
            path = [label for label in path if label != self.blank_id]
            path = [label for label, _ in groupby(path)]
            hypothesis.text = self.decode_tokens_to_str_with_strip_punctuation(path)
        return hypotheses_list


def make(folder):
    given = live(folder)
    model = given["model"]
    model.decoding = Decoding(model.cfg.decoding, vocabulary=list(LABELS))
    model.wer.decoding = model.decoding
    return given


FAULT = Fault("blanks_removed_before_repeats", ("metric-not-collapsed",), "before", make)
