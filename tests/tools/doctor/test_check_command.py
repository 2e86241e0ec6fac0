"""The command `python -m tools.doctor check` and the ways in to `examine`."""

import json
import tarfile

import pytest

from tests.recipes import tiny
from tools.doctor.__main__ import main
from tools.doctor.engine import examine


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return str(tiny.write_rows(folder / "train.json", tiny.corpus(folder)))


@pytest.fixture(scope="module")
def yaml(tmp_path_factory, manifest):
    from omegaconf import OmegaConf

    path = tmp_path_factory.mktemp("conf") / "model.yaml"
    cfg = tiny.config()
    cfg.spec_augment = None
    cfg.optim = {"name": "adamw", "lr": 1e-3, "sched": {"name": "CosineAnnealing", "warmup_steps": 100}}
    cfg.train_ds = {"manifest_filepath": manifest, "batch_size": 4, "labels": cfg.labels}
    OmegaConf.save({"model": cfg, "trainer": {"max_steps": 1000, "gradient_clip_val": 1.0}}, path)
    return str(path)


def run(capsys, *arguments):
    code = main([str(a) for a in arguments])
    return code, capsys.readouterr().out


def test_check_of_a_nemo_yaml_saves_json_and_exits_0(capsys, tmp_path, yaml):
    code, out = run(capsys, "check", "--config", yaml, "--json", tmp_path / "r.json", "--seconds", 120)
    report = json.loads((tmp_path / "r.json").read_text())
    assert code == 0 == report["exit_code"], out
    assert out.startswith("Nothing found that prevents learning")
    families = {line.split(":")[0] for line in report["examined"]}
    assert {"data", "audio", "schedule", "limits", "outputs", "lengths", "invariance", "locality", "labels", "loss",
            "gradients", "depth", "features"} <= families


def test_overrides_reach_a_yaml_and_change_the_verdict(capsys, yaml):
    code, out = run(capsys, "check", "--config", yaml, "model.optim.lr=0", "--only", "schedule")
    assert code == 1 and out.startswith("This will not learn: lr-zero") and "model.optim.lr=1e-3" in out


def test_a_recipe_by_name_with_hydra_overrides(capsys, manifest):
    code, out = run(capsys, "check", "--config-name", "deepspeech2", "corpus=mini", f"corpus.train={manifest}",
                    f"corpus.validation={manifest}", "model.optim.lr=3", "--only", "schedule", "limits")
    assert code == 1 and "lr-too-high" in out


@pytest.mark.parametrize("arguments, words", [
    (["--config", "/nowhere/x.yaml"], "no configuration at /nowhere/x.yaml"),
    (["--config-name", "deepspeach"], "no recipe of that name"),
    (["--model", "/nowhere/x.nemo"], "no model at /nowhere/x.nemo"),
    (["--train", "/nowhere/t.json"], "no manifest at /nowhere/t.json"),
])
def test_what_is_not_there_is_one_finding_and_exit_2(capsys, arguments, words):
    code, out = run(capsys, "check", *arguments)
    assert code == 2 and out.startswith("Could not examine") and words in out and "Traceback" not in out
    assert "input-unreadable" in out or "data-manifest-broken" in out


@pytest.mark.parametrize("name, content", [
    ("broken.nemo", b"PK not a tar"), ("broken.ckpt", b"\x80\x02garbage"), ("empty.nemo", b""),
])
def test_a_broken_model_file(capsys, tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    code, out = run(capsys, "check", "--model", path)
    assert code == 2 and "cannot be restored" in out and name in out


def test_a_broken_yaml_and_one_without_a_model(capsys, tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("model: [unclosed")
    assert run(capsys, "check", "--config", path)[0] == 2
    path.write_text("- a\n- b\n")
    code, out = run(capsys, "check", "--config", path)
    assert code == 2 and "input-unreadable" in out


@pytest.mark.parametrize("change, words", [
    ("model.encoder.activation=nonsense", "model-does-not-build"),
    ("model.encoder._target_=nemo.collections.asr.modules.NoSuchEncoder", "NoSuchEncoder"),
    ("model.decoder.num_classes=5", "model-does-not-build"),
    ("model.preprocessor.features=32", "does not run"),
])
def test_a_configuration_that_does_not_build(capsys, yaml, change, words):
    code, out = run(capsys, "check", "--config", yaml, change, "--only", "outputs")
    assert code == 1 and out.startswith("This will not learn: model-does-not-build") and words in out
    assert "Traceback" not in out


def test_a_nemo_file_and_a_checkpoint_are_restored(tmp_path, yaml, manifest):
    import torch
    from omegaconf import OmegaConf

    model = tiny.model()
    model.save_to(str(tmp_path / "m.nemo"))
    report = examine(model=tmp_path / "m.nemo", manifests={"train": manifest}, families=["outputs", "labels"])
    assert report.exit_code == 0 and any("Outputs are finite" in line for line in report.examined)
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": {"cfg": model.cfg}}, tmp_path / "own.ckpt")
    report = examine(model=str(tmp_path / "own.ckpt"), families=["outputs"])
    assert report.exit_code == 0 and report.examined, report.findings
    torch.save({"state_dict": model.state_dict()}, tmp_path / "bare.ckpt")
    assert examine(model=str(tmp_path / "bare.ckpt"), families=["outputs"]).exit_code == 2
    assert examine(model=str(tmp_path / "bare.ckpt"), config=yaml, families=["outputs"]).exit_code == 0
    part = {key: value for key, value in model.state_dict().items() if "decoder" not in key}
    torch.save({"state_dict": part}, tmp_path / "part.ckpt")
    report = examine(model=str(tmp_path / "part.ckpt"), config=yaml, families=["outputs"])
    assert report.exit_code == 2 and "lacks 2 of the model's weights" in report.verdict
    assert OmegaConf.is_config(model.cfg) and tarfile.is_tarfile(tmp_path / "m.nemo")


def hybrid_config(manifest):
    """Configuration of a tiny hybrid of transducer and CTC over characters."""
    from omegaconf import OmegaConf, open_dict

    cfg = tiny.config()
    labels = list(cfg.labels)
    with open_dict(cfg):
        cfg.spec_augment = None
        cfg.model_defaults = {"enc_hidden": 24, "pred_hidden": 16, "joint_hidden": 16}
        cfg.aux_ctc = {"ctc_loss_weight": 0.3, "decoder": OmegaConf.to_container(cfg.decoder)}
        cfg.decoder = {"_target_": "nemo.collections.asr.modules.RNNTDecoder", "vocab_size": len(labels),
                       "prednet": {"pred_hidden": 16, "pred_rnn_layers": 1, "dropout": 0.1}}
        cfg.joint = {"_target_": "nemo.collections.asr.modules.RNNTJoint", "num_classes": len(labels),
                     "vocabulary": labels, "log_softmax": None,
                     "jointnet": {"encoder_hidden": 24, "pred_hidden": 16, "joint_hidden": 16, "activation": "relu"}}
        cfg.decoding = {"strategy": "greedy", "greedy": {"max_symbols": 3}}
        cfg.loss = {"loss_name": "pytorch"}
        cfg.optim = {"name": "adamw", "lr": 0.0, "sched": {"name": "CosineAnnealing", "warmup_steps": 100}}
        cfg.train_ds = {"manifest_filepath": manifest, "batch_size": 4, "labels": labels, "defer_setup": True}
    return cfg


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory, manifest):
    """(the live model, a .nemo of it, a YAML of it)."""
    from nemo.collections.asr.models import EncDecHybridRNNTCTCModel
    from omegaconf import OmegaConf

    folder = tmp_path_factory.mktemp("hybrid")
    cfg = hybrid_config(manifest)
    OmegaConf.save({"model": cfg, "trainer": {"max_steps": 1000}}, folder / "hybrid.yaml")
    model = EncDecHybridRNNTCTCModel(cfg)
    model.save_to(str(folder / "hybrid.nemo"))
    return model, str(folder / "hybrid.nemo"), str(folder / "hybrid.yaml")


@pytest.mark.parametrize("given", ["live", "nemo", "yaml"])
def test_of_a_hybrid_the_data_and_the_schedule_are_examined_and_its_model_is_not(hybrid, given):
    live, nemo, yaml = hybrid
    report = examine(**{"live": {"model": live}, "nemo": {"model": nemo}, "yaml": {"config": yaml}}[given])
    assert [f.id for f in report.findings if f.weight == "prevents"] == ["lr-zero"], report.findings
    said = [line for line in report.not_examined if "a transducer or hybrid model: only CTC models are probed" in line]
    assert len(said) == 1 and {"data", "schedule"} <= {line.split(":")[0] for line in report.examined}
    assert not [line for line in report.not_examined if line.startswith("outputs")]


def test_a_hybrid_that_is_asked_for_its_outputs_only_could_not_be_examined(hybrid):
    report = examine(model=hybrid[0], families=["outputs", "loss"])
    assert report.findings == [] and report.exit_code == 2 and len(report.not_examined) == 1
    assert "EncDecHybridRNNTCTCModel is a transducer or hybrid model" in report.verdict


def test_a_section_alone_a_dict_and_a_dictconfig_say_the_same(manifest):
    from omegaconf import OmegaConf

    section = OmegaConf.create({"encoder": {"dropout": 0.95}, "optim": {"lr": 0.0, "name": "adamw"}})
    reports = [examine(config=c, families=["schedule", "limits"]) for c in (
        section, OmegaConf.to_container(section), OmegaConf.create({"model": section}))]
    assert [r.ids for r in reports] == [["lr-zero", "dropout-range"]] * 3
    assert [r.findings[0].where for r in reports] == ["optim.lr", "optim.lr", "model.optim.lr"]


def test_out_of_time_is_said(manifest):
    report = examine(manifests={"train": manifest}, seconds=0, families=["data"])
    assert report.findings == [] and report.exit_code == 2
    lines = [line for line in report.not_examined if ": needs " not in line]  # what was not given has no time either
    assert len(lines) > 3 and all("the 0 s given were over" in line for line in lines)


def test_one_broken_check_does_not_hide_the_others(monkeypatch, manifest):
    from tools.doctor import data

    def broken(subject, codes):
        raise RuntimeError("a fault of the doctor's own")

    monkeypatch.setattr(data, "by_file", broken)
    report = examine(manifests={"train": manifest}, families=["data", "pairs"])
    assert any("RuntimeError: a fault of the doctor's own" in line for line in report.not_examined)


def test_list_prints_the_catalogue_and_a_page(capsys):
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    assert "batch-leak" in out and "lr-too-high" in out
    assert main(["list", "batch-leak"]) == 0 and capsys.readouterr().out.startswith("# batch-leak: ")
    assert main(["list", "batch-leek"]) == 2 and "batch-leak" in capsys.readouterr().err
