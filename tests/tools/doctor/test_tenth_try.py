"""What the tenth try has taught: doubled letters, terms on top of a loss, projections that begin at 0, far frames first, batches
without a loss, jobs that begin anew, Adam's rate given to SGD, error rates under another's name."""

import json

import pytest
import torch
from nemo.collections.asr.losses.ctc import CTCLoss
from nemo.collections.asr.models import EncDecCTCModel

import tests.tools.doctor.setups.encoders  # noqa: F401  makes its classes known to NeMo
from tests.tools.doctor.faults import (
    after_dev_shifted_by_a_line, blanks_removed_before_repeats, cosine_head_without_scale, linear_biases_of_the_wrong_sign,
)
from tests.tools.doctor.healthy import head_from_zero, label_smoothing_on_ctc
from tests.tools.doctor.setups import live, tones, written
from tests.tools.doctor.test_moved import trained
from tests.tools.doctor.test_runs_of_others import logged
from tools.doctor.attention import farther
from tools.doctor.engine import examine
from tools.doctor.trace import Trace


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return tones.manifests(tmp_path_factory.mktemp("tones"), count=40)


def found(made, *families):
    return [(f.id, f.weight) for f in examine(**made, families=families).findings]


def test_a_decoding_that_loses_doubled_letters(tmp_path):
    report = examine(**blanks_removed_before_repeats.make(tmp_path), families=["labels"])
    (finding,) = report.findings
    assert (finding.id, finding.where) == ("metric-not-collapsed", "decoding") and "one letter of two" in finding.symptom
    assert "label-order" in report.ruled_out


def test_a_projection_that_begins_at_zero_is_asked_after_its_first_step(tmp_path):
    made = head_from_zero.make(tmp_path)
    report = examine(**made, families=["outputs", "loss", "depth", "gradients", "locality"])
    assert report.findings == [] and "output-constant" in report.ruled_out
    assert not made["model"].decoder.decoder_layers[0].weight.any()


def test_one_that_cannot_leave_zero_has_no_output(tmp_path):
    made = head_from_zero.make(tmp_path)
    made["model"].decoder.requires_grad_(False)
    assert ("output-constant", "prevents") in found(made, "outputs")


class Halved(CTCLoss):
    """Half of the lengths: another loss."""

    def forward(self, log_probs, targets, input_lengths, target_lengths):
        return super().forward(log_probs=log_probs, targets=targets, input_lengths=input_lengths,
                               target_lengths=(target_lengths / 2).ceil().long())


def test_a_term_on_top_of_a_loss_is_told_from_another_loss(tmp_path):
    assert found(label_smoothing_on_ctc.make(tmp_path), "loss") == [("loss-wrong", "warning")]
    made = live(tmp_path)
    made["model"].loss = Halved(28, zero_infinity=True)
    assert found(made, "loss")[0] == ("loss-wrong", "prevents")


def test_attention_that_hears_the_farthest_most(tmp_path):
    report = examine(**linear_biases_of_the_wrong_sign.FAULT.make(tmp_path), families=["depth"])
    assert [(f.id, f.weight) for f in report.findings] == [("time-scrambled", "warning")]
    place = torch.arange(50.0)
    away = (place[:, None] - place[None]).abs()
    assert farther(torch.full((2, 50, 50), 0.02)) == pytest.approx(1.0)
    assert farther((-away).softmax(dim=-1)) < 0.2 and farther(away.softmax(dim=-1)) > 1.3


class LeavesOut(EncDecCTCModel):
    """Every batch whose loss is above `most`."""

    most = 0.0

    def training_step(self, batch, batch_idx):
        output = super().training_step(batch, batch_idx)
        return None if output["loss"] > self.most and batch_idx % 4 != self.but else output

    but = None


@pytest.mark.parametrize("but, weight", [(None, "prevents"), (0, "warning")])
def test_batches_without_a_loss(given, tmp_path, but, weight):
    doctor, _ = trained(given, tmp_path, cls=type("Guarded", (LeavesOut,), {"but": but}), steps=-1, max_epochs=3)
    first = doctor.report().findings[0]
    assert (first.id, first.weight, first.where) == ("weights-not-moved", weight, "training_step")
    assert "had no backward pass" in first.symptom and "lr-too-low" not in doctor.report().ids


def test_a_batch_now_and_then_without_a_loss_is_no_fault(given, tmp_path):
    cls = type("Seldom", (LeavesOut,), {"most": 1e9})
    doctor, _ = trained(given, tmp_path, cls=cls, steps=20)
    assert "weights-not-moved" not in doctor.report().ids


def test_jobs_that_begin_with_nothing_beside_one_configuration(tmp_path):
    (tmp_path / "config.yaml").write_text(json.dumps({"model": {"encoder": {}, "decoder": {}}, "trainer": {"max_steps": 5000}}))
    for version in range(3):
        folder = tmp_path / "lightning_logs" / f"version_{version}"
        logged(folder / "metrics.csv", [{"step": step, "train_loss": 300 - 0.5 * step} for step in range(0, 400, 10)],
               age=100 - version)
        (folder / "hparams.yaml").write_text("{}")
        torch.save({"global_step": 390, "state_dict": {}}, folder / "last.ckpt")
    first = examine(run=tmp_path, families=["run"]).findings[0]
    assert first.id == "run-ended" and "3 times, each time from step 0" in first.symptom


def test_a_run_hears_whether_validation_has_the_texts_of_other_rows(tmp_path):
    made = after_dev_shifted_by_a_line.make(tmp_path)
    first = examine(**made).findings[0]
    assert (first.id, first.where.rsplit("/", 1)[1][:9]) == ("data-mismatched-text", "dev.json:")
    assert "1 line further up" in first.symptom and first.evidence["of its own"] == 0
    dev = tmp_path / "dev.json"
    rows = tones.read(str(dev))
    texts = [row["text"] for row in rows]
    tones.write(str(dev), [{**row, "text": text} for row, text in zip(rows, texts[-1:] + texts[:-1])])  # as they were
    report = examine(**made)
    assert "data-mismatched-text" in report.ruled_out
    assert "heard: Of the texts of validation a model that has learned hears in each utterance its own, not its neighbour's" in (
        report.examined)


def test_texts_that_decoding_writes_otherwise_are_no_other_order_of_labels(tmp_path):
    made = live(tmp_path)
    decoding, plain = made["model"].decoding, made["model"].decoding.ctc_decoder_predictions_tensor

    def capitals(*args, **kwargs):
        found = plain(*args, **kwargs)
        for hypothesis in found:
            hypothesis.text = hypothesis.text.title()
        return found

    decoding.ctc_decoder_predictions_tensor = capitals
    report = examine(**made, families=["labels"])
    assert [(f.id, f.weight) for f in report.findings] == [("metric-normalisation", "warning")], report.findings
    assert "label-order" in report.ruled_out


@pytest.mark.parametrize("accumulated, warned", [(1, False), (64, True)])
def test_steps_of_more_utterances_than_there_are(tmp_path, accumulated, warned):
    made = written(tmp_path, trainer={"accumulate_grad_batches": accumulated})
    found = [f for f in examine(**made, families=["schedule"]).findings if f.id == "batch-size"]
    assert [f.weight for f in found] == ["warning"] * warned
    assert not warned or "more than the whole corpus has" in found[0].symptom


def test_adams_rate_given_to_sgd(tmp_path):
    plain = {"name": "sgd", "lr": 1e-3, "sched": {"name": "CosineAnnealing", "warmup_steps": 50}}
    assert found(written(tmp_path, optim=plain), "optimizer") == [("lr-too-low", "warning")]
    assert found(written(tmp_path, optim={**plain, "momentum": 0.9, "lr": 0.02}), "optimizer") == []


@pytest.mark.parametrize("use_cer", [True, False])
def test_a_word_error_rate_of_characters(tmp_path, use_cer):
    made = written(tmp_path, use_cer=use_cer)
    assert found(made, "limits") == [("metric-normalisation", "warning")] * use_cer


def test_scores_that_are_cosines_are_told_to_be_scaled(tmp_path):
    model = cosine_head_without_scale.run(tmp_path, [])[0]
    first = examine(model=model, families=["outputs"]).findings[0]
    assert first.id == "not-log-probs" and any("cosines" in line for line in first.fix)


def test_without_gradients_the_rate_is_not_blamed():
    from tools.doctor.rates import learning_rate

    trace = Trace()
    for step in range(0, 100, 10):
        trace.add("lr", step, 1e-3)
        trace.add("update", step, 0.0)
    assert [f.id for f in learning_rate(trace)] == ["lr-too-low"]
    trace.still = ["encoder.weight"]
    assert learning_rate(trace) == []
