"""Runs as others leave them: begun again, ended from outside, on several devices, several in one folder, copied."""

import json
import logging
import math
import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from tests.conftest import ROOT
from tests.tools.doctor.runs import FEATURES, Plain, loader, speech
from tools.doctor import callback, saved, speaking, utterances
from tools.doctor.autopsy import Watch, loss_scale
from tools.doctor.bands import at, load, outside, read_curve
from tools.doctor.callback import Doctor
from tools.doctor.devices import FROM_ANOTHER
from tools.doctor.engine import examine
from tools.doctor.explain import read_run
from tools.doctor.finding import Finding, Report
from tools.doctor.logs import RESUME
from tools.doctor.metrics import Tally
from tools.doctor.pace import Pace
from tools.doctor.recount import TRIES, Recount
from tools.doctor.trace import Trace

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def explain(folder) -> Report:
    return examine(run=folder, families=["run", "metrics"])


def logged(path: Path, rows, age: float = 0.0) -> Path:
    """A CSV of Lightning's with `rows` of dicts, last written so many seconds before others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [",".join(names)] + [",".join(str(row.get(name, "")) for name in names) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    stamp = path.stat().st_mtime - age
    os.utime(path, (stamp, stamp))
    return path


def losses(steps, value=lambda s: 40.0, name="train_loss"):
    return [{"step": s, name: value(s)} for s in steps]


def finding(id_: str, weight: str = "prevents", **evidence) -> Finding:
    return Finding(id_, weight, "seen.", "why", evidence, ["change it"], 0.9)


# ---- a run that is still going ---------------------------------------------------------------------------------


def test_without_a_plan_a_run_that_still_writes_is_not_over(tmp_path):
    rows = [{"step": s, "train_loss": 200 * (1 - s / 12000), "lr": 1e-7 * s} for s in range(50, 3000, 50)]
    path = logged(tmp_path / "metrics.csv", rows)
    assert not read_run(tmp_path).ended
    os.utime(path, (1.6e9, 1.6e9))
    assert read_run(tmp_path).ended


# ---- what the callback measured --------------------------------------------------------------------------------


def test_a_measured_loss_is_taken_before_one_of_which_nothing_is_known(tmp_path):
    logged(tmp_path / "metrics.csv", losses(range(50, 6000, 50), lambda s: 170 + s % 3))
    assert read_run(tmp_path).loss_unit == "unknown"
    logged(tmp_path / "doctor" / "curve.csv", [
        {"step": s, "loss": 2.86 + 0.01 * (s % 3), "level": 2.9, "blank_rate": 0.99} for s in range(1, 6000, 5)])
    trace = read_run(tmp_path)
    assert (trace.loss_unit, trace.level) == ("label", 2.9) and max(trace.values("loss")) < 3
    assert explain(tmp_path).findings[0].id == "run-collapse-blank"


def test_validation_is_brought_to_the_unit_of_the_train_loss(tmp_path):
    manifest = tmp_path / "train.json"
    manifest.write_text(json.dumps({"audio_filepath": "a.wav", "duration": 5.0, "text": "ab " * 20}) + "\n")
    (tmp_path / "hparams.yaml").write_text(json.dumps({"cfg": {
        "labels": [" ", "a", "b"], "encoder": {}, "decoder": {}, "train_ds": {"manifest_filepath": str(manifest)}}}))
    logged(tmp_path / "metrics.csv", [{"step": s, "train_loss": 120.0, "val_loss": 180.0} for s in range(10, 100, 10)])
    rows = [json.loads(manifest.read_text())]
    from tools.doctor.configs import load_config

    trace = read_run(tmp_path, load_config(tmp_path / "hparams.yaml"), lambda: rows)
    assert trace.loss_unit == "character" and trace.values("loss")[0] == pytest.approx(2.0)
    assert trace.values("val_loss")[0] == pytest.approx(3.0)


# ---- reports that it left --------------------------------------------------------------------------------------


def test_what_another_device_alone_has_left_is_told(tmp_path):
    logged(tmp_path / "metrics.csv", losses(range(10, 600, 10)))
    Report([finding("features-bad")], ["x"]).save(tmp_path / "doctor" / "report-rank3.json")
    report = explain(tmp_path)
    assert report.exit_code == 1 and report.findings[0].evidence["seen on device"] == 3
    assert not any("was not attached" in line for line in report.not_examined)
    # A sum that this device has spoilt is not told beside it.
    Report([finding("run-nan", **{FROM_ANOTHER: "another"})], ["x"]).save(tmp_path / "doctor" / "report.json")
    Report([finding("features-bad", **{"first at step": 9})], ["x"]).save(tmp_path / "doctor" / "report-rank3.json")
    assert [f.id for f in explain(tmp_path).of_weight("prevents")] == ["features-bad"]


def test_what_was_seen_long_before_the_end_is_a_note(tmp_path):
    logged(tmp_path / "metrics.csv", losses(range(10, 6000, 10)))
    found = [finding("run-plateau", "warning"), finding("explodes"), finding("data-upper-case")]
    for step, weights in ((100, ["note", "note", "prevents"]), (5900, ["warning", "prevents", "prevents"])):
        Report(list(found), [saved.head(step)]).save(tmp_path / "doctor" / "report.json")
        report = explain(tmp_path)
        assert [next(f.weight for f in report.findings if f.id == one.id) for one in found] == weights


def test_a_curve_speaks_for_itself_where_the_report_is_old(tmp_path):
    """The callback's NaN of long ago, and one at the curve's end: the curve's rule must not keep silent for it."""
    logged(tmp_path / "metrics.csv", losses(range(10, 6000, 10), lambda s: 40.0 if s < 3000 else math.nan))
    Report([finding("run-nan", "warning")], [saved.head(100)]).save(tmp_path / "doctor" / "report.json")
    first = explain(tmp_path).findings[0]
    assert (first.id, first.weight) == ("run-nan", "prevents") and "3000" in first.symptom


# ---- several runs in one folder, copies ------------------------------------------------------------------------


def test_independent_runs_are_not_merged(tmp_path):
    logged(tmp_path / "version_0" / "metrics.csv", losses(range(50, 6000, 50)) + [
        {"step": s, "val_wer": 0.2} for s in range(1000, 6000, 1000)], age=100)
    logged(tmp_path / "version_1" / "metrics.csv", losses(range(50, 3000, 50), lambda s: 170.0))
    (tmp_path / "version_1" / "hparams.yaml").write_text(json.dumps({"cfg": {"encoder": {}, "decoder": {}}}))
    Report([finding("data-upper-case")], ["x"]).save(tmp_path / "version_1" / "doctor" / "report.json")
    report = explain(tmp_path)
    assert [f.id for f in report.of_weight("prevents")] == ["data-upper-case"]  # of the newest, as its report is
    warned = next(f for f in report.findings if f.id == "input-unreadable")
    assert "2 runs: version_0, version_1" in warned.symptom and warned.fix == [
        f"python -m tools.doctor explain {tmp_path / 'version_0'}"]


def test_a_run_that_was_begun_again_is_one(tmp_path):
    logged(tmp_path / "version_0" / "metrics.csv", losses(range(50, 3000, 50), lambda s: 20.0), age=100)
    logged(tmp_path / "version_1" / "metrics.csv", losses(range(2500, 9000, 50), lambda s: 10.0))
    trace = read_run(tmp_path)
    points = dict(trace.get("loss"))
    assert (points[50], points[2450], points[2500], trace.last_step) == (20.0, 20.0, 10.0, 8950)
    assert len(trace.get("loss")) == len(points) and "input-unreadable" not in explain(tmp_path).ids


def test_a_run_that_never_went_on_is_told_to_resume(tmp_path):
    for version in range(3):
        folder = tmp_path / f"version_{version}"
        logged(folder / "metrics.csv", losses(range(0, 400, 10)), age=100 - version)
        (folder / "hparams.yaml").write_text(json.dumps({"cfg": {"encoder": {}, "decoder": {}}}))
        (folder / "lightning_logs.txt").write_text("Received SIGTERM: 15\n")
    first = explain(tmp_path).findings[0]
    assert first.id == "run-ended" and "3 times, each time from step 0" in first.symptom and first.fix[0] == RESUME
    (tmp_path / "version_1" / "hparams.yaml").write_text("{}")  # two experiments, then
    ended = next(f for f in explain(tmp_path).findings if f.id == "run-ended")
    assert "3 times" not in ended.symptom and "no checkpoint is there" in ended.fix[0]
    (tmp_path / "version_2" / "last.ckpt").write_bytes(b"x")
    ended = next(f for f in explain(tmp_path).findings if f.id == "run-ended")
    assert "trainer.fit(" in ended.fix[0]


def test_a_test_after_the_training_is_no_run_of_its_own(tmp_path):
    logged(tmp_path / "version_0" / "metrics.csv", losses(range(50, 3000, 50)), age=100)
    logged(tmp_path / "version_1" / "metrics.csv", [{"step": 0, "test_wer": 0.3}])
    assert "input-unreadable" not in explain(tmp_path).ids and read_run(tmp_path).last_step == 2950


def test_event_files_keep_their_order_in_a_copy(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    for made, steps in ((1_700_000_000, range(50, 3000, 50)), (1_700_009_000, range(2500, 9000, 50))):
        with SummaryWriter(tmp_path / str(made)) as writer:
            for step in steps:
                writer.add_scalar("train_loss", 10.0, step)
        written = next((tmp_path / str(made)).glob("events*"))
        written.rename(tmp_path / f"events.out.tfevents.{made}.host.1.0")
    os.utime(tmp_path / "events.out.tfevents.1700000000.host.1.0", (2e9, 2e9))
    assert read_run(tmp_path).last_step == 8950


# ---- logs ------------------------------------------------------------------------------------------------------


def test_logs_of_earlier_sittings_and_of_the_code_are_not_those_of_the_run(tmp_path):
    logged(tmp_path / "metrics.csv", losses(range(10, 600, 10)))
    (tmp_path / "run_0").mkdir()
    (tmp_path / "run_0" / "nemo_log.txt").write_text("torch.OutOfMemoryError: CUDA out of memory.\n")
    (tmp_path / "git-info.log").write_text("+    except KeyboardInterrupt:\n")
    assert read_run(tmp_path).messages == [("run_0/nemo_log.txt", "out of memory: torch.OutOfMemoryError: CUDA out of "
                                                                  "memory.")]  # there is no other
    (tmp_path / "nemo_log.txt").write_text("fine\n")
    assert read_run(tmp_path).messages == [] and "run-ended" not in explain(tmp_path).ids


def test_the_last_log_is_the_one_written_last(tmp_path):
    for name, text, stamp in (("b.log", "NCCL error", 1.6e9), ("a.log", "No space left on device", 1.7e9)):
        (tmp_path / name).write_text(text + "\n")
        os.utime(tmp_path / name, (stamp, stamp))
    assert read_run(tmp_path).messages[-1][0] == "a.log"


def test_the_callbacks_own_line_counts_one_bad_step(tmp_path):
    line = "doctor: step 41: loss is not finite; origin: forward encoder.x; utterances u1, u2\n"
    (tmp_path / "a.log").write_text(line)
    trace = read_run(tmp_path)
    assert (trace.bad.step, trace.bad.utterances, trace.bad_steps) == (41, ["u1", "u2"], 1)


# ---- the callback: begun again, ended from outside -------------------------------------------------------------


def trainer_with(*callbacks, steps=8, **more):
    return pl.Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks), **more)


def test_a_second_fit_knows_nothing_of_the_first(tmp_path):
    doctor = Doctor(folder=tmp_path, stop=True, probe=False, every_n_steps=1)
    trainer_with(doctor, steps=12).fit(Plain(nn.Linear(FEATURES, 8), 8, lr=0.0), loader(speech()[:64]))
    assert doctor.report().findings[0].id == "lr-zero"
    model = Plain(nn.Linear(FEATURES, 8), 8)
    trainer = trainer_with(doctor, steps=12)
    trainer.fit(model, loader(speech()[:64]))
    assert trainer.global_step == 12 and "lr-zero" not in doctor.report().ids
    assert doctor.trace.get("loss")[0][0] == 1 and len(doctor.trace.get("loss")) == 12
    assert all(p is q for (_, p), q in zip(doctor._parameters, model.parameters()))
    doctor._off = True  # of one run
    trainer_with(doctor, steps=3).fit(Plain(nn.Linear(FEATURES, 8), 8), loader(speech()[:64]))
    assert doctor.trace.last_step == 3 and not doctor._off


class Ends(Plain):
    """NaN from the start, and an error at the sixth step."""

    def __init__(self, error):
        super().__init__(nn.Linear(FEATURES, 8), 8)
        self.error = error

    def training_step(self, batch, batch_idx):
        if batch_idx == 5:
            raise self.error
        return super().training_step(batch, batch_idx) * math.nan


@pytest.mark.parametrize("error, probed", [
    (RuntimeError("CUDA out of memory. Tried to"), True), (SystemExit(1), False),
])
def test_how_a_run_ended_is_saved_before_its_model_is_probed(tmp_path, monkeypatch, error, probed):
    path, asked = tmp_path / "doctor" / "report.json", []

    def probe(model, report):
        asked.append("run-ended" in Report.from_dict(json.loads(path.read_text())).ids)
        return report

    monkeypatch.setattr(callback, "probe_model", probe)
    doctor = Doctor(folder=tmp_path)
    with pytest.raises(type(error)):
        trainer_with(doctor).fit(Ends(error), loader(speech()[:64]))
    assert asked == [True] * probed
    ended = [f for f in explain(tmp_path).findings if f.id == "run-ended"]
    assert len(ended) == 1 and type(error).__name__ in ended[0].symptom and ended[0].weight == "warning"
    assert ("a smaller model.train_ds.batch_size" in ended[0].fix[0]) == probed and ended[0].evidence["planned"] == 8
    assert doctor.report().findings[0].id != "run-ended"


def test_a_run_that_is_killed_leaves_what_was_known_a_minute_before(tmp_path, monkeypatch):
    class Looks(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 5:
                report = Report.from_dict(json.loads((tmp_path / "doctor" / "report.json").read_text()))
                seen.append(saved.reaches(report))

    seen: list = []
    monkeypatch.setattr(callback, "SAVE_EVERY", 0.0)
    trainer_with(Doctor(folder=tmp_path, probe=False), Looks()).fit(Plain(nn.Linear(FEATURES, 8), 8),
                                                                    loader(speech()[:64]))
    assert seen == [5]


def test_a_loss_that_nobody_hears_is_freed_of_the_gradient_scaler(tmp_path):
    class Regresses(Plain):
        def training_step(self, batch, batch_idx):
            return (self.output(self.encoder(batch[0])) * 0 + 2.0).mean() + 0 * self.output.bias.sum()

    from lightning.pytorch.plugins.precision import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    doctor = Doctor(folder=tmp_path, probe=False)
    trainer = trainer_with(doctor, steps=3, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    trainer.fit(Regresses(nn.Linear(FEATURES, 8), 8), loader(speech()[:64]))
    assert doctor.trace.values("loss") == [2.0] * 3
    assert loss_scale(SimpleNamespace(precision_plugin=SimpleNamespace(scaler=None))) == 1.0


# ---- what it says, and what it may take ------------------------------------------------------------------------


def test_of_several_devices_the_first_speaks_for_all(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(speaking.log, "warning", lambda line, *values: said.append(line % values))
    report = Report([finding("lr-zero"), finding("features-bad"), finding("run-nan", **{FROM_ANOTHER: "another"})])
    for rank, spoken in ((0, ["lr-zero", "features-bad", "run-nan"]), (3, ["features-bad"])):
        said.clear()
        told: set = set()
        trainer = SimpleNamespace(is_global_zero=rank == 0, global_rank=rank, world_size=8, global_step=7)
        assert speaking.announce(trainer, report, told) and len(told) == 3
        assert not speaking.announce(trainer, report, told)
        assert sorted(line.split(": ")[3] for line in said) == sorted(spoken)
        assert all(line.startswith(f"doctor: device {rank}: step 7: ") for line in said)


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*/results/*.json")), ids=lambda path: path.stem)
def test_published_runs_lie_in_the_band_of_their_recipe(path):
    """Each has one, and at no step is a run of it told that it is outside."""
    held = json.loads(path.read_text())
    curve = read_curve(path.with_suffix(".csv"))
    band = load(held["recipe"], held["corpus"])
    assert band is not None and path.with_suffix(".csv").stat().st_size > 1000
    for column, points in curve.items():
        for step, value in points:
            low, high = at(band, column, step)
            assert low <= value <= high, f"{column} at step {step}"


def test_a_run_beside_its_band_is_not_probed_for_that():
    rows = [line.split(",") for line in (ROOT / "recipes/conformer/results/mini.csv").read_text().splitlines()]
    at = rows[0].index("loss_per_char")
    trace = Doctor(recipe="conformer", corpus="mini").trace
    trace.loss_unit = "character"
    trace.series["loss"] = [(int(row[0]), float(row[at])) for row in rows[1:] if row[at]]
    inside = outside(trace)
    assert [f.id for f in inside] == ["run-early"] and not speaking.troubled(inside, over=True)
    trace.series["loss"] = [(step, 2.9) for step, _ in trace.series["loss"]]
    assert outside(trace)[0].weight == "warning" and not speaking.troubled(outside(trace), over=True)
    assert speaking.troubled([finding("run-plateau", "warning", **{"last step": 900})], over=True)
    assert not speaking.troubled([finding("run-ended", "warning", **{"last step": 900})], over=True)


def test_our_recipes_say_what_they_are(tmp_path, monkeypatch):
    """So that a run of them is compared with healthy ones while it goes on."""
    from recipes import train
    from recipes.config import compose

    def made(**given):
        raise LookupError(given["recipe"], given["corpus"])

    monkeypatch.setattr(callback, "Doctor", made)
    for name in ("check_against_code", "fill_in"):
        monkeypatch.setattr(train, name, lambda *_: None)
    cfg = compose("conformer", ["corpus=mini", "trainer=cpu", f"exp_manager.explicit_log_dir={tmp_path}/run"])
    with pytest.raises(LookupError) as seen:
        train.fit(cfg)
    assert seen.value.args == ("conformer", "mini")


def test_of_several_validation_sets_the_one_that_is_reported_is_counted():
    nemo, own = SimpleNamespace(_val_dl_idx=1), SimpleNamespace()
    trainer = SimpleNamespace(world_size=1, num_val_batches=[3, 3])
    recount = Recount()
    recount.open(trainer, nemo, [], [])
    assert [recount.hears(k) for k in range(2)] == [False, True] and recount.why_not == ""
    recount.open(trainer, own, [], [])
    assert not recount.hears(0)
    assert recount.why_not == f"{Tally.title}: of several validation sets the rate may count all"
    recount.open(SimpleNamespace(world_size=2, num_val_batches=[3]), nemo, [], [])
    assert not recount.hears(1) and "on several devices" in recount.why_not


def test_a_validation_that_takes_too_long_is_given_up():
    trainer, recount = SimpleNamespace(world_size=1, num_val_batches=[3]), Recount()
    for _ in range(TRIES):
        recount.open(trainer, SimpleNamespace(), [], [])
        assert recount.hears(0)
        recount.take(None, affordable=False)
        assert not recount.hears(0) and recount.close({}) is None
    recount.open(trainer, SimpleNamespace(), [], [])
    assert not recount.hears(0) and "share of the run's time" in recount.why_not


def test_the_recount_stays_within_two_percent_of_a_long_run(monkeypatch):
    pace, now = Pace(10, 0.01), [0.0]
    monkeypatch.setattr("tools.doctor.pace.time", SimpleNamespace(perf_counter=lambda: now[0]))
    pace.begun, pace.cost = 0.0, 0.9
    assert pace.affordable(2.0, least=50.0) and not pace.affordable()  # a short run has a second
    pace.cost, now[0] = 21.0, 1000.0
    assert not pace.affordable(2.0, least=50.0)


def test_manifests_are_searched_again_only_where_there_is_time(monkeypatch):
    given = []
    monkeypatch.setattr(utterances, "of_batch", lambda batch, model, call, manifests: given.append(manifests))
    doctor = Doctor()
    doctor.trace = Trace(settings=SimpleNamespace(manifests={"train": ["train.json"]}))
    doctor._names(None, None, None)
    doctor._names(None, None, None, look_up=False)
    assert given == [["train.json"], []]


def test_the_wait_for_the_device_is_told_apart_and_a_scan_is_counted(monkeypatch):
    import time

    monkeypatch.setattr("tools.doctor.pace.settle", lambda device: time.sleep(0.15))
    pace = Pace(10, 0.01)
    pace.begun = time.perf_counter()
    model = nn.Sequential(nn.Linear(4, 4))
    with Watch(model, leaves_only=True, counted=lambda: pace.counted(torch.device("cuda"))) as watch:
        model(torch.ones(2, 4))
    assert len(watch.outputs) == 1 and 0 < pace.cost < 0.1 <= pace.waited
    assert "waited 0." in pace.share()
