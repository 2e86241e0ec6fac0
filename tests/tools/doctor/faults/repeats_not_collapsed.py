"""A greedy decoder of one's own that removes blanks and forgets to collapse repeats."""

from nemo.collections.asr.parts.submodules.ctc_decoding import CTCDecoding
from omegaconf import OmegaConf

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import live, tones


class Decoding(CTCDecoding):
    def ctc_decoder_predictions_tensor(self, decoder_outputs, decoder_lengths=None, fold_consecutive=True,
                                       return_hypotheses=False):
        texts = []
        for i, scores in enumerate(decoder_outputs):
            symbols = scores.argmax(-1)[: int(decoder_lengths[i]) if decoder_lengths is not None else None].tolist()
            texts.append("".join(tones.LABELS[s] for s in symbols if s < len(tones.LABELS)))
        return texts


def make(folder):
    given = live(folder)
    model = given["model"]
    model.decoding = Decoding(OmegaConf.create({"strategy": "greedy_batch"}), vocabulary=tones.LABELS)
    model.wer.decoding = model.decoding
    return given


FAULT = Fault("repeats_not_collapsed", ("metric-not-collapsed",), "before", make)
