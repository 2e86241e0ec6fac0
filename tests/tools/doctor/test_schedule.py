"""The families that look at the configuration alone. No torch."""

import json

import pytest
from omegaconf import OmegaConf

from tests.recipes import tiny
from tools.doctor.engine import examine

FAMILIES = ["schedule", "limits"]


def config(**changes):
    """A NeMo configuration that trains; `changes` by dotted keys with __ for the dot."""
    cfg = OmegaConf.create({
        "model": {
            "train_ds": {"batch_size": 32},
            "encoder": {"_target_": "nemo.collections.asr.modules.ConformerEncoder", "d_model": 256, "dropout": 0.1},
            "optim": {"name": "adamw", "lr": 2.0, "weight_decay": 1e-3,
                      "sched": {"name": "NoamAnnealing", "d_model": 256, "warmup_steps": 10000, "min_lr": 1e-6}},
        },
        "trainer": {"devices": 4, "max_steps": 100000, "gradient_clip_val": 1.0, "precision": 32},
    })
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    return cfg


def first(**changes):
    report = examine(config=config(**changes), families=FAMILIES)
    return report, (report.findings[0] if report.findings else None)


def test_a_published_schedule_is_healthy_and_resolved():
    report, found = first()
    assert found is None and report.exit_code == 0
    from tools.doctor.schedule import plan
    from tools.doctor.subject import Subject

    subject = Subject(config=config())
    subject.open(FAMILIES)
    p = plan(subject)
    assert p.peak == pytest.approx(2.0 / 16 / 100) and p.utterances == 128 and p.steps == 100000
    assert p.rate(10000) == pytest.approx(p.peak) and p.rate(40000) == pytest.approx(p.peak / 2)


def planned(**changes):
    from tools.doctor.schedule import plan
    from tools.doctor.subject import Subject

    subject = Subject(config=config(**changes))
    subject.open(FAMILIES)
    return plan(subject)


def test_noam_hold_annealing_is_given_its_peak_and_follows_nemo():
    torch = pytest.importorskip("torch")
    from nemo.core.optim.lr_scheduler import NoamHoldAnnealing

    hold = {"model__optim__sched__name": "NoamHoldAnnealing", "model__optim__lr": 1e-3, "trainer__max_steps": 1000,
            "model__optim__sched__warmup_steps": 50, "model__optim__sched__hold_steps": 200,
            "model__optim__sched__min_lr": 1e-5}
    report, found = first(**hold)
    assert found is None and {"lr-too-low", "lr-too-high"} <= set(report.ruled_out)
    p = planned(**hold)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    own = NoamHoldAnnealing(optimizer, max_steps=1000, warmup_steps=50, hold_steps=200, min_lr=1e-5)
    for step in range(900):
        assert p.rate(step) == pytest.approx(optimizer.param_groups[0]["lr"]), step
        optimizer.step()
        own.step()


@pytest.mark.parametrize("changes, reason", [
    ({"model__optim__sched__warmup_steps": None, "model__optim__sched__warmup_ratio": 0.1, "trainer__max_steps": -1,
      "trainer__max_epochs": 100}, "warmup_ratio"),
    ({"model__optim__sched__d_model": None, "model__encoder__d_model": None}, "d_model"),
])
def test_a_peak_of_noam_that_is_not_known_is_not_judged(changes, reason):
    report, found = first(**changes)
    assert found is None, found
    assert planned(**changes).peak is None
    assert any("NoamAnnealing" in line and reason in line for line in report.not_examined), report.not_examined


COSINE = {"model__optim__sched__name": "CosineAnnealing"}


@pytest.mark.parametrize("fault, weight, changes", [
    ("lr-zero", "prevents", {"model__optim__lr": 0.0}),
    ("lr-too-high", "prevents", COSINE),  # Noam's multiplier as an absolute rate
    ("lr-too-low", "prevents", {"model__optim__lr": 1e-3}),  # an absolute rate as Noam's multiplier
    ("lr-too-high", "warning", {**COSINE, "model__optim__lr": 0.03}),
    ("lr-too-low", "prevents", {**COSINE, "model__optim__lr": 1e-3, "trainer__max_steps": -1,
                                "trainer__max_epochs": 500, "model__optim__sched__max_steps": 20,
                                "model__optim__sched__warmup_steps": 5}),
    ("warmup-too-long", "prevents", {"trainer__max_steps": 2000}),
    ("warmup-missing", "warning", {**COSINE, "model__optim__lr": 1e-3, "model__optim__sched__warmup_steps": 0}),
    ("warmup-missing", "prevents", {"model__optim__sched__warmup_steps": 0}),
    ("schedule-per-epoch", "prevents", {"model__optim__sched__interval": "epoch"}),
    ("batch-size", "warning", {"model__train_ds__batch_size": 1, "trainer__devices": 1}),
    ("clip-missing", "note", {"trainer__gradient_clip_val": None}),
    ("clip-missing", "warning", {"trainer__gradient_clip_val": None, "trainer__grad_clip": 5.0}),
    ("clip-missing", "warning", {"trainer__gradient_clip_val": 0.0, "model__encoder___target_": "x.RNNEncoder"}),
    ("clip-too-low", "prevents", {"trainer__gradient_clip_val": 1e-6}),
    ("clip-too-low", "prevents", {"trainer__gradient_clip_val": 1e-3, "model__optim__name": "sgd",
                                  **COSINE, "model__optim__lr": 0.1}),
    ("dropout-range", "prevents", {"model__encoder__dropout": 0.9}),
    ("dropout-range", "warning", {"model__encoder__dropout_att": 0.6}),
    ("weight-decay-range", "prevents", {"model__optim__weight_decay": 2.0}),
    ("weight-decay-range", "prevents", {"model__optim__weight_decay": 0.2, "model__optim__name": "adam"}),
    ("optimizer-betas", "warning", {"model__optim__betas": [0.98, 0.9]}),
    ("optimizer-betas", "prevents", {"model__optim__betas": [0.9, 1.0]}),
    ("precision-overflow", "prevents", {"trainer__precision": "16-true"}),
    ("precision-overflow", "warning", {"trainer__precision": "16-mixed"}),
])
def test_faults_of_a_configuration(fault, weight, changes, tmp_path):
    if changes.get("trainer__max_epochs"):
        rows = [{"audio_filepath": f"/a{i}", "duration": 3.0, "text": "a"} for i in range(640)]
        changes = {**changes, "model__train_ds__manifest_filepath": str(tiny.write_rows(tmp_path / "t.json", rows))}
    report, found = first(**changes)
    assert found is not None and (found.id, found.weight) == (fault, weight), report.ids
    assert found.fix and found.where


@pytest.mark.parametrize("name, betas", [("adamw", [0.9, 0.98]), ("adam", [0.9, 0.999]), ("novograd", [0.8, 0.25])])
def test_betas_of_published_recipes_are_no_fault(name, betas):
    report, _ = first(model__optim__name=name, model__optim__betas=betas, **COSINE)
    assert "optimizer-betas" not in report.ids


def test_steps_follow_from_epochs_manifest_and_batch(tmp_path):
    rows = [{"audio_filepath": f"/a{i}", "duration": 3.0, "text": "a"} for i in range(256)]
    path = str(tiny.write_rows(tmp_path / "t.json", rows))
    report, found = first(trainer__max_steps=-1, trainer__max_epochs=10, model__train_ds__manifest_filepath=path)
    assert found.id == "warmup-too-long" and found.evidence["steps"] == 20  # 256 / (32 * 4) * 10


@pytest.mark.parametrize("recipe", ["deepspeech", "deepspeech2", "conformer"])
@pytest.mark.parametrize("size", [[], ["size=full", "trainer=gpu"]])
def test_our_recipes_are_healthy(recipe, size):
    report = examine(config=recipe, overrides=size, families=FAMILIES)
    assert report.findings == [] or all(f.id == "data-manifest-broken" for f in report.findings)


@pytest.mark.parametrize("override, fault", [
    ("model.optim.lr=0", "lr-zero"),
    ("model.optim.lr=1.0", "lr-too-high"),
    ("training.warmup_share=0.9", "warmup-too-long"),
    ("training.warmup_share=1.5", "warmup-too-long"),
    ("training.global_batch_seconds=1000", "batch-size"),
    ("training.weight_decay=-1", "weight-decay-range"),
])
def test_overrides_of_our_recipes(override, fault, tmp_path):
    rows = [{"audio_filepath": f"/a{i}", "duration": 3.0, "text": "a"} for i in range(1200)]
    train = str(tiny.write_rows(tmp_path / "t.json", rows))
    report = examine(config="conformer", families=FAMILIES,
                     overrides=[override, f"corpus.train={train}", f"corpus.validation={train}"])
    assert report.ids[0] == fault


def test_a_configuration_without_training_is_not_judged():
    report = examine(config={"model": {"encoder": {"x": 1}}}, families=FAMILIES)
    assert report.findings == [] and any("neither model.optim nor trainer" in line for line in report.not_examined)


def test_a_schedule_is_rehearsed_without_being_stepped():
    torch = pytest.importorskip("torch")
    from tools.doctor.live import rehearsed

    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([weight], lr=1.0)
    rising = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 10, 1.0))
    rates = rehearsed(rising, 20)
    held = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=torch.tensor(1.0), foreach=False)
    tensors = rehearsed(torch.optim.lr_scheduler.LinearLR(held, 0.1, total_iters=10), 20)
    assert tensors[0] < 0.2 and tensors[-1] == 1.0 and float(held.param_groups[0]["lr"]) < 0.2
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1.0 and rates[4] == pytest.approx(0.5)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 5)
    chain = torch.optim.lr_scheduler.SequentialLR(
        optimizer, [warm, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)], milestones=[5])
    before, epochs = optimizer.param_groups[0]["lr"], (chain.last_epoch, warm.last_epoch, rising.last_epoch)
    assert max(rehearsed(chain, 12)) > 3 * before
    assert optimizer.param_groups[0]["lr"] == before
    assert (chain.last_epoch, warm.last_epoch, rising.last_epoch) == epochs


def per_epoch(kind, parameters=None):
    """A schedule to be stepped once an epoch, on an optimizer of these parameters, or of one."""
    import torch
    from torch.optim import lr_scheduler

    class Timms:
        """As timm's: made by nobody of torch, and its `step` wants the epoch."""

        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self, epoch):
            self.optimizer.param_groups[0]["lr"] = 1e-3 / (epoch + 1)

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            pass

    optimizer = torch.optim.AdamW(parameters or [torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    return {
        "a warm-up of five epochs": lambda: lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5),
        "one cycle over the epochs": lambda: lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=10),
        "a decay": lambda: lr_scheduler.ExponentialLR(optimizer, 0.9),
        "on a plateau": lambda: lr_scheduler.ReduceLROnPlateau(optimizer),
        "of timm": lambda: Timms(optimizer),
        "no schedule": lambda: object(),
        "one cycle over the steps": lambda: lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=400),
        "a warm-up of 500 steps": lambda: lr_scheduler.LinearLR(optimizer, 0.01, total_iters=500),
    }[kind]()


@pytest.mark.parametrize("kind, named", [
    ("a warm-up of five epochs", False), ("one cycle over the epochs", False), ("a decay", False),
    ("on a plateau", False), ("of timm", False), ("no schedule", False), ("one cycle over the steps", True),
    ("a warm-up of 500 steps", True),
])
def test_a_schedule_by_epochs_is_judged_by_its_rates(kind, named):
    pytest.importorskip("torch")
    from tools.doctor.live import hardly_rising

    found = hardly_rising(per_epoch(kind), epochs=10, steps=400)
    assert [(f.id, f.weight) for f in found] == ([("schedule-per-epoch", "prevents")] if named else [])


def test_a_warm_up_by_epochs_in_a_trial_of_one_is_only_a_warning():
    pytest.importorskip("torch")
    from tools.doctor.live import hardly_rising

    assert [f.weight for f in hardly_rising(per_epoch("a warm-up of five epochs"), epochs=1, steps=40)] == ["warning"]


@pytest.mark.parametrize("kind, named", [
    ("a warm-up of five epochs", False), ("one cycle over the epochs", False), ("of timm", False),
    ("a warm-up of 500 steps", True),
])
def test_schedules_by_epochs_of_a_live_run(tmp_path, kind, named):
    pytest.importorskip("torch")
    import lightning.pytorch as pl
    from torch import nn

    from tests.tools.doctor.runs import FEATURES, Plain, loader, speech
    from tools.doctor.callback import Doctor

    class Own(Plain):
        def configure_optimizers(self):
            schedule = per_epoch(kind, list(self.parameters()))
            return [schedule.optimizer], [schedule]

        def lr_scheduler_step(self, scheduler, metric):
            scheduler.step(self.current_epoch) if kind == "of timm" else scheduler.step()

    doctor = Doctor(folder=tmp_path, stop=True, probe=False)
    trainer = pl.Trainer(max_epochs=10, limit_train_batches=4, accelerator="cpu", logger=False, callbacks=[doctor],
                         enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(Own(nn.Linear(FEATURES, 8), 8), loader(speech()[:32]))
    report = doctor.report()
    assert (tmp_path / "doctor" / "report.json").is_file() and not doctor._off
    assert ("schedule-per-epoch" in [f.id for f in report.of_weight("prevents")]) == named, report.findings
    assert (trainer.global_step == 40) == (not named)


def test_a_floor_above_the_rate_is_named():
    found = examine(config={"model": {"optim": {"name": "adamw", "lr": 5e-5, "sched": {
        "name": "CosineAnnealing", "warmup_steps": 100, "min_lr": 1e-3}}}, "trainer": {"max_steps": 1000}},
        families=["schedule"]).findings
    assert [(f.id, f.weight) for f in found] == [("lr-too-low", "prevents")] and "min_lr=0.001" in found[0].symptom


@pytest.mark.parametrize("limits, weight, where", [
    ({"max_duration": 6}, "warning", "max_duration"), ({"max_duration": 1}, "prevents", "max_duration"),
    ({"min_duration": 11}, "warning", "min_duration"), ({"max_duration": 15}, None, None), ({}, None, None),
])
def test_limits_of_duration_that_drop_most_of_the_data(tmp_path, limits, weight, where):
    path = tmp_path / "train.json"
    rows = [{"audio_filepath": f"/{i}.wav", "duration": 2.0 + i / 8, "text": "a"} for i in range(100)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [f for f in examine(config={"model": {"train_ds": limits, "optim": {"lr": 1e-3}}}, families=["limits"],
                                manifests={"train": str(path)}).findings if f.id == "data-filtered"]
    assert [f.weight for f in found] == ([weight] if weight else [])
    for finding in found:
        assert finding.where == f"model.train_ds.{where}" and finding.fix[0].startswith(finding.where)
        assert "of 100 utterances" in finding.symptom


@pytest.mark.parametrize("shuffle, in_blocks, weight", [
    (False, True, "warning"), (False, False, "note"), (True, True, None), (None, True, None)])
def test_train_that_is_never_shuffled(tmp_path, shuffle, in_blocks, weight):
    rows = [{"audio_filepath": f"/{i // 10 if in_blocks else i % 10}/a{i}", "duration": 3.0, "text": "a"} for i in range(100)]
    path = str(tiny.write_rows(tmp_path / "t.json", rows))
    cfg = {"train_ds": {"manifest_filepath": path, **({} if shuffle is None else {"shuffle": shuffle})}}
    report = examine(config={"model": cfg}, manifests={"train": path}, families=["order"])
    assert [(f.id, f.weight) for f in report.findings] == ([("data-order", weight)] if weight else [])
    assert ("data-order" in report.ruled_out) == (shuffle is True)
