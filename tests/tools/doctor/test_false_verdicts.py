"""Healthy runs that a rule once called lost, each beside the fault that the rule is for and has to go on naming."""

import math
import random
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from torch import nn

from tests.tools.doctor.test_frozen import front, stepped
from tools.doctor.engine import examine
from tools.doctor.live import optimizer_findings
from tools.doctor.metrics import Tally, examine_pairs
from tools.doctor.nonfinite import non_finite
from tools.doctor.run import diagnose, overfitting, progress
from tools.doctor.trace import BadStep, Trace, shape

FORGOTTEN = "not-in-optimizer"


def trace_with(steps=400, every=1, **series) -> Trace:
    """A trace whose series are given as functions of the step; None leaves a step out."""
    trace = Trace(loss_unit="character", level=2.9, planned=steps)
    for name, function in series.items():
        for step in range(every, steps + 1, every):
            if (value := function(step)) is not None:
                trace.add(name, step, value)
    return trace


def falling(step):
    return max(3 - step / 200, 0.5)


def told(findings) -> list[tuple[str, str]]:
    return [(f.id, f.weight) for f in findings if f.weight != "note"]


# ---- not finite ------------------------------------------------------------------------------------------------


def test_a_gradient_scaler_that_looks_for_its_scale_is_no_nan():
    healthy = trace_with(loss=falling, grad_norm=lambda s: math.inf if s in (1, 2, 150, 400) else 1.0)
    healthy.precision = "16-mixed"
    assert told(diagnose(healthy)[0]) == []
    endless = trace_with(loss=falling, grad_norm=lambda s: math.inf if s > 300 else 1.0)
    endless.precision = "16-mixed"
    assert told(non_finite(endless)) == [("run-nan", "prevents")]


@pytest.mark.parametrize("name", ["loss", "val_loss", "grad_norm"])
def test_a_few_values_that_are_not_finite_in_a_run_that_goes_on_are_a_warning(name):
    for bad, words in (((200,), "at step 200, once"), ((200, 240), "at 2 steps, first at step 200")):
        series = {"loss": falling, name: lambda s: math.nan if s in bad else falling(s)}
        found, = non_finite(trace_with(every=10, **series))
        assert (found.id, found.weight) == ("run-nan", "warning") and words in found.symptom
    series = {"loss": falling, name: lambda s: math.nan if s == 200 or s > 300 else falling(s)}
    found, = non_finite(trace_with(every=10, **series))
    assert found.weight == "prevents" and "from step 310 on" in found.symptom


def test_one_validation_that_is_not_finite_at_the_end_is_not_yet_for_good():
    last = lambda first: trace_with(every=10, loss=falling,  # noqa: E731
                                    val_loss=lambda s: (math.inf if s >= first else 1.0) if s % 100 == 0 else None)
    assert told(non_finite(last(400))) == [("run-nan", "warning")]
    assert told(non_finite(last(300))) == [("run-nan", "prevents")]


@pytest.mark.parametrize("bad_steps, since, weight", [
    (3, 1.0, "warning"),  # skipped, and the run went on
    (300, 1.0, "prevents"),  # nearly all are skipped
    (1, math.nan, "prevents"),  # its log speaks of the first alone, the curve of the others
    (0, 1.0, "warning"), (0, math.nan, "prevents"), (2, None, "prevents"),
])
def test_what_the_log_says_is_judged_by_what_followed(bad_steps, since, weight):
    trace = trace_with(loss=lambda s: falling(s) if s < 100 else since)
    trace.bad, trace.bad_steps = BadStep(100, "loss"), bad_steps
    found, = non_finite(trace)
    assert (found.id, found.weight) == ("run-nan", weight)


def test_an_overflow_that_the_scaler_got_over_is_a_warning():
    trace = trace_with(loss=falling, grad_norm=lambda s: math.inf if 50 <= s < 62 else 1.0)
    trace.precision, trace.bad, trace.bad_steps = "16-mixed", BadStep(59, "gradient", "backward", "encoder.x"), 3
    assert told(non_finite(trace)) == [("precision-overflow", "warning")]


# ---- lost again ------------------------------------------------------------------------------------------------


def unknown_unit(loss, wer) -> Trace:
    trace = trace_with(20000, 50, loss=loss, val_wer=lambda s: wer(s) if s % 1000 == 0 else None)
    trace.loss_unit, trace.level, trace.ended = "unknown", None, True
    return trace


@pytest.mark.parametrize("seed", range(8))
def test_a_flat_loss_of_unknown_unit_is_not_lost_again(seed):
    noise = random.Random(seed)
    trace = unknown_unit(lambda s: noise.gauss(20, 3), lambda s: 0.12)
    assert told(diagnose(trace)[0]) == [] and shape(trace).learned


@pytest.mark.parametrize("wer", [lambda s: 0.12 if s < 12000 else 1.0, lambda s: 0.12 if s < 12000 else None])
def test_a_loss_of_unknown_unit_that_is_lost_is_told(wer):
    noise = random.Random(0)
    late = unknown_unit(lambda s: noise.gauss(20 + 150 * math.exp(-s / 500) if s < 12200 else 120, 3), wer)
    found, = progress(late)
    assert (found.id, found.weight) == ("run-diverged", "prevents") and found.evidence["lost from step"] >= 12200


def test_a_character_error_rate_is_no_proof_of_hearing():
    trace = trace_with(2000, 50, loss=lambda s: 2.9, val_wer=lambda s: 0.8)
    assert shape(trace).learned
    trace.settings = SimpleNamespace(get=lambda key, default=None: key == "model.use_cer" or default)
    assert not shape(trace).learned


# ---- checkpoints -----------------------------------------------------------------------------------------------


def saved(folder, make, steps=(100, 200)):
    for step in steps:
        torch.manual_seed(step)
        weights = {"encoder.layer.weight": torch.randn(64, 64), **make(step)}
        torch.save({"state_dict": weights, "global_step": step}, folder / f"step{step}.ckpt")
    return examine(run=folder, families=("run",))


def mask(step):
    return {"encoder.mask": torch.full((50, 50), -math.inf).triu(1)}


def test_a_mask_of_minus_infinity_is_whole(tmp_path):
    assert saved(tmp_path, mask).ids == []
    (tmp_path / "one").mkdir()
    assert saved(tmp_path / "one", mask, steps=(100,)).ids == []


@pytest.mark.parametrize("make", [
    lambda step: {"encoder.table": torch.full((5,), math.nan)},
    lambda step: {"encoder.norm.running_var": torch.full((5,), math.inf)},
    lambda step: {"encoder.rnn.weight_ih_l0": torch.full((5,), math.inf)},
    lambda step: {"encoder.scale": torch.full((5,), 1.0 if step == 100 else math.inf)},
])
def test_values_that_became_infinite_are_not(tmp_path, make):
    report = saved(tmp_path, make)
    assert report.ids == ["run-nan"] and report.findings[0].weight == "prevents"


def test_a_table_of_positions_is_not_frozen_and_weights_are(tmp_path):
    assert saved(tmp_path, lambda step: {"encoder.pe.pe": torch.linspace(0, 1, 5000).reshape(1, 50, 100)}).ids == []
    (tmp_path / "still").mkdir()
    found, = saved(tmp_path / "still", lambda step: {"encoder.rnn.weight_ih_l0": torch.ones(100, 100)}).findings
    assert (found.id, found.weight, found.where) == ("frozen", "prevents", "encoder.rnn.weight_ih_l0")


# ---- optimizer -------------------------------------------------------------------------------------------------


def only_the_output(model, **trainer):
    """What is said of a model whose optimizer holds the output layer alone, at its first step."""
    model(torch.randn(2, 20, 16)).square().mean().backward()
    optimizer = torch.optim.Adam(model.output.parameters(), lr=1e-3)
    return optimizer_findings(SimpleNamespace(optimizers=[optimizer], **trainer), model)


def test_a_trained_encoder_that_is_left_out_may_be_meant_and_a_random_one_not():
    assert told(only_the_output(front())) == [(FORGOTTEN, "prevents")]
    assert told(only_the_output(front(norm=False))) == [(FORGOTTEN, "prevents")]
    found, = only_the_output(stepped(front()))
    assert found.weight == "warning" and "gains of their normalisations differ" in found.cause


def test_a_new_decoder_is_not_covered_up_by_a_trained_encoder():
    model = stepped(front())
    model.decoder = nn.Linear(64, 64)  # put in after the optimizer was made
    assert told(only_the_output(model)) == [(FORGOTTEN, "prevents")]


def test_averaged_weights_in_the_model_belong_into_no_optimizer():
    model = front()
    model.averaged = torch.optim.swa_utils.AveragedModel(model.encoder)
    optimizer = torch.optim.Adam([*model.encoder.parameters(), *model.output.parameters()], lr=1e-3)
    model(torch.randn(2, 20, 16)).square().mean().backward()
    assert all(p.requires_grad for p in model.averaged.parameters())
    assert optimizer_findings(SimpleNamespace(optimizers=[optimizer]), model) == []


def test_optimizers_over_flat_partitions_are_not_judged():
    from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, SingleDeviceStrategy

    for kind, judged in ((SingleDeviceStrategy, True), (DDPStrategy, True), (DeepSpeedStrategy, False),
                         (FSDPStrategy, False)):
        found = only_the_output(front(), strategy=kind.__new__(kind))
        assert told(found) == ([(FORGOTTEN, "prevents")] if judged else []), kind


# ---- rates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [2000, None])  # None: a schedule that does not say it
def test_the_first_steps_of_a_warm_up_move_nothing_and_are_meant_to(warmup):
    def run(steps, update):
        trace = trace_with(steps, loss=lambda s: 3.2, lr=lambda s: 1e-2 * min(s / 2000, 1), update=update)
        trace.planned, trace.warmup, trace.optimizer = 100_000, warmup, "SGD"
        return "lr-too-low" in [f.id for f in diagnose(trace)[0]]

    assert not run(60, lambda s: 2e-8 * s)
    assert run(8000, lambda s: 1e-10 * min(s, 2000))


# ---- metrics ---------------------------------------------------------------------------------------------------


def tally(model) -> Tally:
    """A validation of two words in ten wrong."""
    pairs = [("a b c d e", "a b c d e"), ("f g h i j", "f g x y j")] * 2
    made = Tally(model)
    made.batches = [{"right": pairs[:2], "repeats": pairs[:2]}, {"right": pairs[2:], "repeats": pairs[2:]}]
    return made


def test_the_rate_of_a_hybrid_is_that_of_its_ctc_head():
    hybrid = SimpleNamespace(ctc_wer=SimpleNamespace(use_cer=False))
    assert tally(hybrid).judge({"val_wer": 0.1, "val_wer_ctc": 0.2}) == []
    assert tally(hybrid).judge({"val_wer": 0.1}) is None
    assert told(tally(hybrid).judge({"val_wer": 0.2, "val_wer_ctc": 0.1})) == [("metric-normalisation", "warning")]
    assert told(tally(SimpleNamespace()).judge({"val_wer": 0.1})) == [("metric-normalisation", "warning")]


@pytest.mark.parametrize("given, words", [
    ({"wer": {"use_cer": True}}, "characters"), ({"ctc_wer": {"use_cer": True}, "wer": {}}, "characters"),
    ({"decoding": {"strategy": "beam"}}, "beam"), ({"decoding": {}, "ctc_decoding": {"strategy": "wfst"}}, "wfst"),
    ({"decoding": {"strategy": "greedy_batch", "greedy": {"ngram_lm_model": "x.arpa"}}}, "language model"),
    ({"decoding": {"strategy": "greedy_batch", "greedy": {}}, "wer": {"use_cer": False}}, ""),
    ({"decoding": {"strategy": "beam"}, "ctc_decoding": {"strategy": "greedy"}}, ""), ({}, ""),
])
def test_a_rate_of_characters_or_of_a_beam_is_not_compared_with_that_of_the_best_labels(given, words):
    from omegaconf import OmegaConf

    from tools.doctor.metrics import other_rate

    parts = {name: SimpleNamespace(cfg=OmegaConf.create(value), **value) for name, value in given.items()}
    model = SimpleNamespace(**parts)
    assert words in other_rate(model) and bool(words) == bool(other_rate(model))


CASED = [("Hello there Mr Smith", "Hello there mr Smith"), ("we met in Rome today", "we met in Rome Today"),
         ("I saw them go home", "I saw them go home")]


def test_a_model_that_writes_capitals_itself_is_normalised_alike_on_both_sides():
    plain, cased = 0 / 14, 2 / 14
    for reported in (None, plain, cased, 100 * cased):
        assert examine_pairs(CASED, "dev", reported) == []
    assert told(examine_pairs(CASED, "dev", 0.5)) == [("metric-normalisation", "warning")]
    for change in (str.lower, str.upper):  # of one side alone
        assert told(examine_pairs([(change(r), h) for r, h in CASED], "dev")) == [("metric-normalisation", "warning")]
        assert told(examine_pairs([(r, change(h)) for r, h in CASED], "dev")) == [("metric-normalisation", "warning")]


# ---- plots -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit, together", [(1.0, True), (60.0, False)])
def test_a_validation_loss_an_utterance_is_not_drawn_in_nats_a_character(unit, together):
    stuck = trace_with(2000, 10, loss=lambda s: 2.86, val_loss=lambda s: 2.9 * unit if s % 500 == 0 else None)
    plot, = (p for p in progress(stuck)[0].plots if p.title == "Loss")
    assert ("validation" in plot.series) == together and plot.y_label == "nats a character"

    rises = trace_with(2000, 10, loss=lambda s: 3 * math.exp(-s / 400),
                       val_loss=lambda s: unit * (2 + s / 1000) if s % 200 == 0 else None)
    titles = [plot.title for plot in overfitting(rises)[0].plots]
    assert titles == (["Loss"] if together else ["Train loss", "Validation loss"])


def test_before_anything_is_learned_the_shortest_text_is_no_other_rows_text(tmp_path):
    """To random weights every utterance is likeliest to be the shortest text of validation."""
    from tests.tools.doctor.faults import faults
    from tests.tools.doctor.table import judge

    [fault] = [fault for fault in faults() if fault.name == "padding_in_batchnorm"]
    row = judge(fault, tmp_path)
    assert row.rank == 1 and "data-mismatched-text" not in {finding.id for finding in row.findings}
