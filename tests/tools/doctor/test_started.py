"""Configurations that start from another model's weights, as NeMo's scripts read them."""

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from omegaconf import OmegaConf

from tests.tools.doctor.setups import models, tones
from tools.doctor.engine import examine
from tools.doctor.started import _taken_over

LIGHT = ["tokenizer", "gradients", "limits"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(path of a .nemo with characters, of one with tokens, manifests)."""
    folder = tmp_path_factory.mktemp("started")
    manifests = tones.manifests(folder)
    plain = models.build(models.section("conformer", manifests))
    plain.save_to(str(folder / "plain.nemo"))
    section = models.section("conformer", manifests)
    section["tokenizer"] = models.tokenizer(folder, manifests, 32)
    tokens = models.build(models.bpe(section))
    tokens.save_to(str(folder / "tokens.nemo"))
    return str(folder / "plain.nemo"), str(folder / "tokens.nemo"), manifests


def fine_tuning(path, manifests, **model):
    """The shape of NeMo's speech_to_text_finetune.yaml: no encoder, no decoder."""
    return OmegaConf.create({
        "name": "finetuning", "init_from_nemo_model": path,
        "model": {"sample_rate": 16000, "char_labels": {"update_labels": False, "labels": None},
                  "tokenizer": {"update_tokenizer": False, "dir": None, "type": "bpe"},
                  "optim": models.optim(1e-4), **models.datasets(manifests), **model},
        "trainer": models.trainer()})


@pytest.mark.parametrize("which", [0, 1])
def test_a_healthy_fine_tuning_is_examined_with_the_model_that_it_starts_from(trained, which):
    report = examine(config=fine_tuning(trained[which], trained[2]), families=LIGHT, seconds=120)
    assert not [f for f in report.findings if f.weight == "prevents"], report.findings
    assert any("gets a gradient" in line for line in report.examined)


def test_neither_a_model_to_start_from_nor_one_to_build(trained):
    report = examine(config=fine_tuning(None, trained[2]), families=["gradients"])
    (finding,) = report.findings
    assert (finding.id, finding.where) == ("model-does-not-build", "init_from_nemo_model")
    assert "init_from_nemo_model is null" in finding.symptom and finding.fix[0] == "init_from_nemo_model=model.nemo"


def test_a_model_that_is_fetched_is_not_examined_and_no_fault(trained):
    cfg = fine_tuning(None, trained[2])
    cfg.init_from_pretrained_model = "stt_en_conformer_ctc_small"
    report = examine(config=cfg, families=["tokenizer"])
    assert not report.findings and any("that the configuration starts from" in line for line in report.not_examined)


def test_a_path_that_is_not_there(trained, tmp_path):
    report = examine(config=fine_tuning(str(tmp_path / "gone.nemo"), trained[2]), families=["gradients"])
    assert [(f.id, f.where) for f in report.findings] == [("input-unreadable", "init_from_nemo_model")]


def test_a_new_tokenizer_that_is_not_there(trained, tmp_path):
    cfg = fine_tuning(trained[1], trained[2],
                      tokenizer={"update_tokenizer": True, "dir": str(tmp_path / "none"), "type": "bpe"})
    report = examine(config=cfg, families=["gradients"])
    assert [(f.id, f.where) for f in report.findings] == [("model-does-not-build", "model.tokenizer")]


def test_new_labels_are_those_of_the_model_that_is_probed(trained):
    cfg = fine_tuning(trained[0], trained[2], char_labels={"update_labels": True, "labels": list(" etaoin")})
    report = examine(config=cfg, families=["data"])
    assert not report.findings or {f.id for f in report.findings} == {"data-characters"}
    report = examine(config=cfg, families=["data", "gradients"])
    assert "data-characters" in {f.id for f in report.findings if f.weight == "prevents"}


def test_weights_of_another_vocabulary_stop_nemo(trained):
    labels = [*models.LABELS, "é"]
    cfg = models.recipe("conformer", trained[2], labels=labels, decoder=models.decoder(None, labels))
    report = examine(config={"init_from_nemo_model": trained[0], **cfg}, families=["gradients"])
    (finding,) = [f for f in report.findings if f.weight == "prevents"]
    assert finding.id == "model-does-not-build" and "size mismatch for decoder" in finding.symptom
    assert "exclude=[decoder]" in finding.fix[0]


def test_weights_of_another_class_are_not_taken(trained):
    model, given = (models.build(models.section("conformer", trained[2]), seed) for seed in (0, 1))
    wrapped = SimpleNamespace(state_dict=lambda: {f"module.{k}": v for k, v in given.state_dict().items()})
    (finding,) = _taken_over(model, wrapped, "x.nemo")
    assert (finding.id, finding.weight) == ("weights-not-taken", "warning") and "0%" in finding.symptom
    assert _taken_over(model, given, "x.nemo") == []
    own, taken = model.state_dict(), given.state_dict()
    assert all(torch.equal(own[name], taken[name]) for name in own)


def test_the_right_weights_are_taken_over_in_silence(trained):
    report = examine(config={"init_from_nemo_model": trained[0], **models.recipe("conformer", trained[2])},
                     families=["gradients"])
    assert not report.findings
