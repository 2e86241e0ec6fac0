"""Runs explained from what they leave: curve.csv of ours, TensorBoard, CSV and text logs, configuration,
checkpoints."""

import json
import math
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.tools.doctor.runs import write_curve
from tools.doctor.bands import learn
from tools.doctor.bands.__main__ import main as make_band
from tools.doctor.causes import name_causes
from tools.doctor.engine import examine
from tools.doctor.explain import read_events, read_run
from tools.doctor.finding import Finding, Report
from tools.doctor.nonfinite import non_finite
from tools.doctor.trace import BadStep, Trace

FAMILIES = ["run", "metrics"]


def explain(folder) -> Report:
    return examine(run=folder, families=FAMILIES)


def config(steps=1000, warmup=100, **model) -> dict:
    """A NeMo-style configuration; `trainer` and `optim` as the run had them."""
    return {"trainer": {"max_steps": steps, "gradient_clip_val": 1.0, "precision": "32"},
            "model": {"labels": [" ", "a", "b"], "optim": {"name": "adamw", "lr": 1e-3, "sched": {
                "name": "CosineAnnealing", "warmup_steps": warmup}}, **model}}


def curve(steps=1000, every=10, loss=lambda s: 2.9, blank=lambda s: 0.5, lr=lambda s: 1e-3, norm=lambda s: 1.0, **val):
    rows = []
    for step in range(every, steps + 1, every):
        rows.append({"step": step, "loss_per_char": loss(step), "blank_rate": blank(step), "learning_rate": lr(step),
                     "grad_norm": norm(step)})
        if val and step % (steps // 8) == 0:
            rows.append({"step": step, **{name: function(step) for name, function in val.items()}})
    return rows


def learns(step):
    """A loss like those of the recipes: plateau, fall, slow end."""
    return 0.1 + 2.8 / (1 + (step / 90) ** 3) + 1.2 * math.exp(-step / 8)


def wobble(step, size):
    return size * math.sin(step * 1.7) * math.cos(step * 0.31)


# ---- ours ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["deepspeech", "deepspeech2", "conformer"])
@pytest.mark.parametrize("rows", [2, 4, 8, 15, 30, None])
def test_the_committed_runs_are_healthy_at_every_length(tmp_path, recipe, rows):
    lines = (ROOT / "recipes" / recipe / "results" / "mini.csv").read_text().splitlines()
    steps = int(lines[-1].split(",")[0])
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "curve.csv").write_text("\n".join(lines[: rows and rows + 1]) + "\n")
    whole = config(steps, steps // 10) | {"name": recipe, "corpus": {"name": "mini"}, "training": {}}
    (folder / "config.yaml").write_text(json.dumps(whole))
    report = explain(folder)
    assert report.exit_code == 0 and not report.of_weight("warning"), report.verdict
    inside = [f for f in report.findings if "inside" in f.symptom]
    assert len(inside) == 1 and f"a healthy run of {recipe} on mini" in inside[0].symptom


def test_a_plateau_that_lasts_is_told_from_the_start(tmp_path):
    for steps, planned, weight in ((150, 1000, "note"), (500, 1000, "warning"), (1000, 1000, "prevents")):
        rows = curve(steps, loss=lambda s: 2.86 + wobble(s, 0.02), blank=lambda s: 0.9)
        report = explain(write_curve(tmp_path / str(steps), rows, config(planned)))
        first = report.findings[0] if weight != "note" else report.of_weight("note")[0]
        assert (first.id, first.weight) == ("run-early" if weight == "note" else "run-plateau", weight)
        assert report.exit_code == (weight == "prevents")


def test_a_collapse_to_blank_at_the_start_and_late(tmp_path):
    stuck = curve(1000, loss=lambda s: 2.9 + wobble(s, 0.01), blank=lambda s: 0.999)
    first = explain(write_curve(tmp_path / "stuck", stuck, config())).findings[0]
    assert first.id == "run-collapse-blank" and "never left it" in first.cause

    late = curve(1000, loss=lambda s: learns(s) if s < 600 else 3.0, blank=lambda s: 0.4 if s < 600 else 0.999)
    first = explain(write_curve(tmp_path / "late", late, config())).findings[0]
    assert first.id == "run-collapse-blank" and "no start-up plateau" in first.cause
    assert 580 <= first.evidence["at step"] <= 600 and 600 <= first.evidence["lost from step"] <= 640


def test_learned_and_lost_as_the_rate_rose(tmp_path):
    rate = lambda s: 4e-3 * s / 500  # noqa: E731
    rows = curve(500, loss=lambda s: learns(s) if s < 250 else 3.2 + wobble(s, 0.3), lr=rate)
    first = explain(write_curve(tmp_path / "x", rows, config(500, 500))).findings[0]
    assert first.id in ("lr-too-high", "warmup-too-long")
    rows = curve(500, loss=lambda s: learns(s) if s < 250 else 3.2 + wobble(s, 0.3),
        lr=lambda s: 1e-3 if s < 240 else 5e-3)
    report = explain(write_curve(tmp_path / "y", rows, config(500, 50)))
    assert report.findings[0].id == "lr-too-high"
    assert next(f for f in report.findings if f.id == "run-diverged").weight == "note"


def test_nan_after_growing_gradients(tmp_path):
    bad = 400
    rows = curve(500, loss=lambda s: learns(s) if s < 380 else 9.0 if s < bad else math.nan,
                 norm=lambda s: 1.0 if s < 380 else 400.0 if s < bad else math.nan, lr=lambda s: 1e-3)
    first = explain(write_curve(tmp_path / "x", rows, config(1000))).findings[0]
    assert first.id == "lr-too-high" and f"step {bad}" in first.symptom


def test_nan_without_a_sign_of_its_cause_invents_none(tmp_path):
    rows = curve(500, loss=lambda s: learns(s) if s < 400 else math.nan, norm=lambda s: 1.0 if s < 400 else math.nan)
    first = explain(write_curve(tmp_path / "x", rows, config(1000))).findings[0]
    assert first.id == "run-nan" and first.confidence <= 0.5 and "callbacks=[tools.doctor.Doctor()]" in first.fix[0]
    assert "do not say" in first.cause


def test_a_loss_that_runs_away_at_the_end_is_not_thrown_about(tmp_path):
    """A run on its plateau whose last loss before the NaN is large: its rate is not to blame for that."""
    rows = curve(220, 4, loss=lambda s: 2.95 if s < 212 else 15.8 if s < 216 else math.nan,
                 norm=lambda s: 5.0 if s < 212 else math.nan)
    report = explain(write_curve(tmp_path / "x", rows, config(400, 8)))
    assert report.findings[0].id == "run-nan" and "lr-too-high" not in report.ids


@pytest.mark.parametrize("values, expected", [
    ([1.5**k for k in range(60)] + [math.nan] * 5, "explodes"),  # runs ahead
    ([math.nan] * 5 + [1.5**k for k in range(60)][::-1], "explodes"),  # runs backwards
    ([1.5**k for k in range(60)] + [math.nan] * 5 + [0.0] * 9, "explodes"),  # and padding behind
    ([0.0] * 9 + [math.nan] * 5 + [1.5**k for k in range(60)][::-1], "explodes"),  # and padding before, turned round
    ([math.nan] * 3 + [1.5 ** abs(k) for k in range(-30, 30)] + [math.inf] * 3, "explodes"),  # both, added up
    ([1.0, 2.0] * 20 + [math.nan] + [1.0, 2.0] * 20, "run-nan"),  # one frame breaks
    ([1.0, 2.0] * 20 + [math.nan] * 3, "run-nan"),  # breaks without having grown
])
def test_growth_is_seen_in_both_directions_of_time(values, expected):
    bad = BadStep(108, "loss", "forward", "encoder.rnn", "RecurrentLayer", growth=(list(range(len(values))), values))
    assert [finding.id for finding in non_finite(Trace(bad=bad, bad_steps=6))] == [expected]


def test_nan_in_a_run_whose_recurrence_can_explode_is_put_down_to_it():
    def nan(where):
        return Finding("run-nan", "prevents", "The loss is not finite.", "", {"first at step": 108}, [], 0.9, where)

    source = Finding("explodes", "warning", "The recurrence has no bound.", "", {}, [], 0.85, "encoder.rnn")
    rate = Finding("lr-too-high", "prevents", "Steps are too large.", "", {}, [], 0.7)
    for where in ("encoder.rnn", "encoder.rnn.ahead", ""):
        report = Report(name_causes([rate, nan(where), source]))
        assert report.ids[:2] == ["explodes", "lr-too-high"] and "step 108" in report.findings[0].symptom
        assert report.findings[-1].id == "run-nan" and report.findings[-1].weight == "note"
    elsewhere = Report(name_causes([nan("encoder.norm"), source]))
    assert elsewhere.ids == ["run-nan", "explodes"]


def test_a_dead_deepspeech_is_built_anew_and_its_recurrence_named(tmp_path):
    """Its curve alone says only that the loss is NaN; the model of its configuration says why."""
    from omegaconf import OmegaConf

    from recipes.config import compose

    cfg = compose("deepspeech", [
        "corpus=mini", "trainer=cpu", "logger=csv", "trainer.max_steps=400", "model.encoder.hidden=32",
        "model.encoder.rnn_hidden=32", "model.encoder.norm=none", "model.encoder.rnn_norm=none",
        "model.encoder.rnn_type=relu", "model.encoder.init=torch", "model.optim.sched.warmup_steps=8"])
    rows = curve(220, 4, loss=lambda s: 2.95 if s < 212 else 15.8 if s < 216 else math.nan,
                 norm=lambda s: 5.0 if s < 212 else math.nan)
    folder = write_curve(tmp_path / "run", rows, OmegaConf.to_container(cfg, resolve=False))
    report = examine(run=folder, families=None, seconds=60)
    first = report.findings[0]
    assert (first.id, first.weight, first.where) == ("explodes", "prevents", "encoder.rnn")
    assert "step 212" in first.symptom and "lr-too-high" not in report.ids


def test_rates(tmp_path):
    zero = explain(write_curve(tmp_path / "zero", curve(300, lr=lambda s: 0.0), config()))
    assert zero.findings[0].id == "lr-zero"
    rising = curve(500, loss=lambda s: 3.5 - s / 1000, lr=lambda s: 1e-7 * s)
    noam = explain(write_curve(tmp_path / "noam", rising, config(500, 10000)))
    assert noam.findings[0].id == "warmup-too-long" and "10000" in noam.findings[0].symptom


def test_overfitting(tmp_path):
    rows = curve(1000, loss=learns, val_loss=lambda s: 0.8 - s / 1000 if s < 300 else 0.3 + s / 1000,
                 val_wer=lambda s: 0.5 if s < 300 else 0.5 + s / 4000)
    found = [f for f in explain(write_curve(tmp_path / "x", rows, config())).findings if f.id == "run-overfitting"]
    assert found and found[0].weight == "warning" and found[0].evidence["at step"] == 250


# ---- text logs -------------------------------------------------------------------------------------------------


def test_our_own_log_names_batch_and_utterances(tmp_path):
    folder = write_curve(tmp_path / "x", curve(300, loss=learns), config())
    (folder / "lightning_logs.txt").write_text(
        "[WARNING] step 41: loss is nan: batch skipped, nothing was updated; utterances ['u1', 'u2']; the audio "
        "itself is "
        "not finite in ['u2']\n"
        "utterance u7: CTC loss is infinite, 30 targets (and blanks between repeats) do not fit into 12 output "
        "frames; it\n")
    report = explain(folder)
    bad = next(f for f in report.findings if f.id == "features-bad")
    assert bad.evidence["utterances of that batch"] == ["u2"] and "step 41" in bad.symptom
    hidden = next(f for f in report.findings if f.id == "infinite-loss-hidden")
    assert hidden.evidence["which"] == {"u7": "needs 30 frames, has 12"}


def test_how_it_ended(tmp_path):
    folder = write_curve(tmp_path / "x", curve(300, loss=learns), config(1000))
    (folder / "slurm.out").write_text(
        "Traceback (most recent call last):\n  File \"train.py\", line 3, in <module>\n    go()\n"
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n")
    found = next(f for f in explain(folder).findings if f.id == "run-ended")
    assert "CUDA out of memory" in found.symptom and "300 of 1000" in found.symptom
    assert "model.train_ds.batch_size" in found.fix[0]


# ---- anybody's run ---------------------------------------------------------------------------------------------


def events(folder: Path, steps, **tags) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder) as writer:
        for step in range(10, steps + 1, 10):
            for tag, function in tags.items():
                if (value := function(step)) is not None:
                    writer.add_scalar(tag.replace("__", " "), value, step)


@pytest.mark.parametrize("shape", ["NeMo's own", "whole"])
def test_tensorboard_of_a_nemo_run_in_nats_an_utterance(tmp_path, shape):
    """NeMo logs the mean over utterances: the manifest's texts turn it into nats a character. Its hparams.yaml holds
    the model's section below the one key `cfg`, no trainer."""
    manifest = tmp_path / "train.json"
    manifest.write_text("".join(json.dumps({"audio_filepath": "a.wav", "duration": 5.0, "text": "ab " * 20}) + "\n"
                                for _ in range(4)))
    folder = tmp_path / "run"
    events(folder, 3000, train_loss=lambda s: 60 * 2.86 + wobble(s, 1.0), learning_rate=lambda s: 1e-3,
           val_wer=lambda s: 1.0 if s % 500 == 0 else None)
    whole = config(3000, train_ds={"manifest_filepath": str(manifest)})
    (folder / "hparams.yaml").write_text(json.dumps(whole if shape == "whole" else {"cfg": whole["model"]}))
    report = explain(folder)
    first = report.findings[0]
    assert first.id == "run-plateau" and first.weight == "prevents"
    assert abs(first.evidence["loss at the end"] - 2.86) < 0.05
    assert "input-unreadable" not in report.ids and any("model.optim.lr" in line for line in first.fix)


def test_a_lone_cfg_without_a_model_is_refused_by_what_it_holds(tmp_path):
    from tools.doctor.configs import ConfigUnreadable, load_config

    (tmp_path / "hparams.yaml").write_text("cfg:\n  layers: 3\n")
    with pytest.raises(ConfigUnreadable, match="nothing of a model or a training, only layers"):
        load_config(tmp_path / "hparams.yaml")


def test_a_loss_without_unit_is_not_judged_by_its_level(tmp_path):
    folder = tmp_path / "run"
    events(folder, 3000, train_loss=lambda s: 170 + wobble(s, 1.0))
    report = explain(folder)
    assert report.exit_code == 0 and "run-plateau" not in report.ruled_out
    assert any("unknown unit" in line for line in report.not_examined)


def test_waiting_for_data_from_nemos_step_timing(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        for k in range(20):
            writer.add_scalar("train_step_timing in s", 0.4, 10 * k,
                walltime=1000.0 + 10 * k)  # a step a second, 0.4 s of it work
    _, waits = read_events(next(tmp_path.glob("events*")))
    assert all(abs(v - 0.6) < 1e-6 for _, v in waits) and len(waits) == 19
    assert [f.id for f in explain(tmp_path).findings] == ["data-slow"]


def test_lightnings_csv_logs(tmp_path):
    folder = tmp_path / "lightning_logs" / "version_0"
    folder.mkdir(parents=True)
    lines = ["epoch,step,train_loss,lr,val_wer"] + [f"0,{s},{'nan' if s > 60 else 3.0},0.001," for s
        in range(0, 100, 5)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    first = explain(tmp_path).findings[0]
    assert first.id == "run-nan" and first.evidence["first at step"] == 65


def test_a_cut_off_event_file_and_an_empty_folder_are_no_traceback(tmp_path):
    (tmp_path / "events.out.tfevents.1.x").write_bytes(b"\x18\x00\x00\x00broken")
    report = explain(tmp_path)
    assert report.ids == ["input-unreadable"] and report.exit_code == 2 and "holds nothing" in report.verdict
    assert any("no curve" in line for line in report.not_examined)
    gone = examine(run=tmp_path / "nowhere", families=FAMILIES)
    assert gone.exit_code == 2 and "nowhere" in gone.findings[0].symptom


def test_the_callbacks_report_is_taken_up(tmp_path):
    folder = write_curve(tmp_path / "x", curve(300, loss=lambda s: learns(s) if s < 200 else math.nan), config())
    seen = Finding("explodes", "prevents", "encoder.rnn grows.", "ReLU.", {"first at step": 200}, ["LSTM"], 0.95,
        "encoder.rnn")
    Report([seen], ["x"]).save(folder / "doctor" / "report.json")
    report = explain(folder)
    assert report.findings[0].id == "explodes" and report.findings[0].evidence["seen by"].startswith("the callback")
    assert "run-nan" not in report.ids


# ---- checkpoints -----------------------------------------------------------------------------------------------


def save(path: Path, step: int, change=None, **extra) -> None:
    import torch

    torch.manual_seed(0)
    weights = {"encoder.w": torch.randn(30, 30), "encoder.bn.running_mean": torch.zeros(30),
        "decoder.w": torch.randn(30)}
    weights = {name: value + (0 if name == "decoder.w" else step) for name, value in weights.items()}
    if change:
        change(weights)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": weights, "global_step": step, **extra}, path)
    stamp = 1_700_000_000 + step
    import os

    os.utime(path, (stamp, stamp))


def test_checkpoints_with_a_configuration_inside_are_read_as_weights(tmp_path):
    from omegaconf import OmegaConf

    save(tmp_path / "a.ckpt", 10, hyper_parameters=OmegaConf.create({"cfg": {"encoder": {"d": 3}}}))
    save(tmp_path / "b.ckpt", 20, lambda w: w["encoder.w"].fill_(float("nan")))
    first = explain(tmp_path).findings[0]
    assert first.id == "run-nan" and "encoder.w" in first.symptom and "step 20" in first.symptom
    assert first.evidence["last checkpoint that is whole"] == "a.ckpt"


def test_poisoned_batchnorm_statistics_are_told_from_poisoned_weights(tmp_path):
    save(tmp_path / "a.ckpt", 10, lambda w: w["encoder.bn.running_mean"].fill_(float("nan")))
    first = explain(tmp_path).findings[0]
    assert first.id == "run-nan" and "BatchNorm" in first.cause


def test_weights_that_never_moved(tmp_path):
    def still(weights):
        import torch

        torch.manual_seed(5)
        weights["encoder.w"] = torch.randn(30, 30)

    save(tmp_path / "a.ckpt", 10, still)
    save(tmp_path / "b.ckpt", 20, still)
    first = explain(tmp_path).findings[0]
    assert first.id == "frozen" and first.weight == "prevents" and first.where == "encoder.w"


def test_a_checkpoint_that_would_run_code_is_not_opened(tmp_path):
    import torch

    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"state_dict": {"a": torch.ones(2)}, "x": Evil()}, tmp_path / "evil.ckpt")
    report = explain(tmp_path)
    assert not (tmp_path / "ran").exists()
    assert report.findings[0].id == "input-unreadable" and report.exit_code == 0


# ---- predictions -----------------------------------------------------------------------------------------------


def predictions(folder: Path, pairs, wer=None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "predictions_dev.json").write_text(
        "".join(json.dumps({"text": r, "pred_text": h}) + "\n" for r, h in pairs))
    if wer is not None:
        (folder / "metrics.json").write_text(json.dumps({"manifests": [{"name": "dev", "wer": wer}]}))
    return folder


PAIRS = [("a b c d e f g h", "a b c d e f g h"), ("i", "j"), ("k l", "k m"), ("n o p q r s", "n o p q r t")]


def test_reported_rates_against_the_predictions(tmp_path):
    right = 3 / 17
    averaged = (0 + 1 + 1 / 2 + 1 / 6) / 4
    assert explain(predictions(tmp_path / "right", PAIRS, right)).findings == []
    first = explain(predictions(tmp_path / "averaged", PAIRS, averaged)).findings[0]
    assert first.id == "metric-averaged" and first.evidence["counted anew"] == pytest.approx(right)
    other = explain(predictions(tmp_path / "other", PAIRS, 0.02)).findings[0]
    assert other.id == "metric-normalisation" and other.confidence < 0.5


def test_texts_that_differ_only_in_case_and_stops(tmp_path):
    pairs = [(r.upper() + ".", h) for r, h in PAIRS]
    first = explain(predictions(tmp_path, pairs)).findings[0]
    assert first.id == "metric-normalisation" and first.evidence["as stored"] > first.evidence["normalised alike"]


def test_hypotheses_that_are_frames(tmp_path):
    pairs = [("hello there", "hhheeellllooo ttthhheeerrreee")] * 3
    assert explain(predictions(tmp_path, pairs)).findings[0].id == "metric-not-collapsed"


# ---- bands -----------------------------------------------------------------------------------------------------


def test_bands_are_made_again_from_curves_of_seeds(tmp_path):
    curves = [write_curve(tmp_path / f"seed{k}", curve(400, loss=lambda s,
        k=k: learns(s) * (1 + 0.2 * k))) / "curve.csv"
              for k in range(3)]
    one, three = learn(curves[:1], "r", "c"), learn(curves, "r", "c")
    assert three["runs"] == 3 and three["margin"] < one["margin"] and three["steps"] == 400
    at = three["columns"]["loss_per_char"]["step"].index(200)
    low, high = (three["columns"]["loss_per_char"][side][at] for side in ("low", "high"))
    assert low < learns(200) < 1.4 * learns(200) < high
    assert make_band([*map(str, curves), "--recipe", "r", "--corpus", "c", "--out", str(tmp_path / "band.json")]) == 0
    assert json.loads((tmp_path / "band.json").read_text()) == three
    assert make_band([str(tmp_path / "missing.csv"), "--recipe", "r", "--corpus", "c"]) == 1


def test_outside_the_band_is_a_warning_and_no_more(tmp_path):
    whole = config(2000, 100) | {"name": "deepspeech2", "corpus": {"name": "mini"}, "training": {}}
    rows = curve(400, loss=lambda s: 2.0, blank=lambda s: 0.3)
    report = explain(write_curve(tmp_path / "x", rows, whole))
    band = [f for f in report.findings if "healthy run of deepspeech2" in f.symptom]
    assert band[0].weight == "warning" and report.exit_code == 0 and len(band[0].plots) >= 2


def test_no_band_for_other_data_and_where_there_is_none(tmp_path):
    rows = curve(400, loss=lambda s: 2.0, blank=lambda s: 0.3)
    said = {}
    for corpus, train in (("mini", "data/mini/train.json"), ("mini", "mine/train.json"), ("librispeech_100h", None)):
        whole = config(2000, 100, train_ds={"manifest_filepath": train}) | {
            "name": "deepspeech2", "corpus": {"name": corpus}, "training": {}}
        report = explain(write_curve(tmp_path / f"{corpus}{train}".replace("/", "_"), rows, whole))
        said[corpus, train] = [f.weight for f in report.findings if "healthy run of" in f.symptom] + [
            line.split(": ", 2)[2] for line in report.not_examined if "healthy runs" in line]
    assert list(said.values()) == [
        ["warning"], ["the run is not of a recipe and corpus of ours"],
        ["there is no band of healthy runs of deepspeech2 on librispeech_100h"]]


def test_reading_needs_no_configuration(tmp_path):
    trace = read_run(write_curve(tmp_path / "x", curve(100, loss=learns)))
    assert trace.loss_unit == "character" and trace.last_step == 100 and trace.sources == ["curve.csv"]
