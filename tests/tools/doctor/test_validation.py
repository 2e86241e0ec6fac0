"""The rate that a model's validation makes of outputs that are known, before any training."""

import pytest
import torch
from nemo.collections.asr.models import EncDecCTCModel

from tests.tools.doctor.setups import models, tones
from tools.doctor.engine import examine


class Averaged(EncDecCTCModel):
    def multi_validation_epoch_end(self, outputs, dataloader_idx=0):
        rates = [x["val_wer_num"] / x["val_wer_denom"] for x in outputs]
        return {"log": {"val_wer": torch.stack(rates).mean()}}


class InCapitals(EncDecCTCModel):
    """Whose references are compared in capitals with texts that are not."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        audio, audio_lengths, targets, sizes = batch
        out, frames, _ = self.forward(input_signal=audio, input_signal_length=audio_lengths)
        texts = self.decoding.ctc_decoder_predictions_tensor(out, decoder_lengths=frames, return_hypotheses=False)
        labels = self.decoder.vocabulary
        references = ["".join(labels[i] for i in row[:size]).upper() for row, size in zip(targets.tolist(), sizes)]
        pairs = [(r.split(), getattr(t, "text", t).split()) for r, t in zip(references, texts)]
        wrong = sum(sum(a != b for a, b in zip(r, t)) for r, t in pairs)
        return {"val_wer": wrong / sum(len(r) for r, _ in pairs)}


class Stuttering(EncDecCTCModel):
    """Whose texts have a letter for each frame that is not blank."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        audio, audio_lengths, targets, sizes = batch
        out, _, best = self.forward(input_signal=audio, input_signal_length=audio_lengths)
        labels = self.decoder.vocabulary
        spelt = ["".join(labels[i] for i in row[:size]) for row, size in zip(targets.tolist(), sizes)]
        texts = ["".join(labels[i] for i in row if i < len(labels)) for row in best.tolist()]
        wrong = sum(a != b for one, two in zip(spelt, texts) for a, b in zip(one.split(), two.split()))
        self.validation_step_outputs.append({"val_wer": torch.tensor(wrong / sum(len(t.split()) for t in spelt))})


class ReadsPadding(EncDecCTCModel):
    """Which decodes all frames of a batch."""

    def validation_pass(self, batch, batch_idx, dataloader_idx=0):
        audio, audio_lengths, targets, sizes = batch
        out, frames, _ = self.forward(input_signal=audio, input_signal_length=audio_lengths)
        self.wer.update(predictions=out, targets=targets, targets_lengths=sizes,
                        predictions_lengths=torch.full_like(frames, out.shape[1]))
        rate, wrong, words = self.wer.compute()
        self.wer.reset()
        return {"val_wer_num": wrong, "val_wer_denom": words, "val_wer": rate}


def judge(given, cls=None, **changes):
    section = models.section("conv", given, **changes)
    model = models.build(section, **({"cls": cls} if cls else {}))
    before = vars(model)["_validation_step_outputs"]
    report = examine(model=model, manifests=given, families=["validation"])
    assert vars(model)["_validation_step_outputs"] is before and "forward" not in vars(model)
    return report


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return tones.manifests(tmp_path_factory.mktemp("tones"))


@pytest.mark.parametrize("cls, expected", [
    (None, []), (Averaged, ["metric-averaged"]), (InCapitals, ["metric-normalisation"]),
    (Stuttering, ["metric-not-collapsed"]), (ReadsPadding, ["length-ignored"]),
])
def test_the_rate_of_known_outputs(given, cls, expected):
    report = judge(given, cls)
    assert report.ids == expected, report.not_examined
    assert all(finding.weight == "warning" for finding in report.findings)
    known = {"metric-averaged", "metric-not-collapsed", "metric-normalisation", "length-ignored"}
    assert known - set(expected) >= set(report.ruled_out)
    assert expected or len(report.ruled_out) == 4


def test_the_mean_and_the_sum_are_told(given):
    evidence = judge(given, Averaged).findings[0].evidence
    assert evidence["reported"] == evidence["mean of the rates"] == 0.5
    assert 0.2 < evidence["errors by words"] < 0.4  # of 12 words or so that few are wrong


def test_a_step_that_does_not_run_is_not_examined(given):
    class Own(EncDecCTCModel):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            return batch["audio"]

    report = judge(given, Own)
    assert not report.findings and not report.ruled_out
    assert any("validation step does not run" in line for line in report.not_examined)


def test_a_model_that_returns_no_rate_is_not_examined(given):
    class Own(EncDecCTCModel):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            return None

    report = judge(given, Own)
    assert not report.findings and any("no val_wer" in line for line in report.not_examined)
