"""Whatever is wrong with what the doctor is given: one clear line and exit code 2, or a finding and 1; no traceback."""

import contextlib
import json
import os

import pytest

from tests.conftest import ROOT
from tests.recipes import tiny
from tests.tools.doctor.runs import conformer_encoder
from tools.doctor.__main__ import main

ROWS = [{"audio_filepath": "/nowhere/a.wav", "duration": 1.0, "text": "some words"}] * 3
LINES = [json.dumps(row) for row in ROWS]


@pytest.fixture
def ask(capsys):
    """Runs the command; returns its exit code and what it prints."""

    def run(*arguments):
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out + err

    return run


def section(**changes):
    """A `model:` section of NeMo's, with parts replaced."""
    from omegaconf import OmegaConf

    cfg = OmegaConf.to_container(tiny.config())
    cfg["encoder"] = conformer_encoder()
    cfg["decoder"]["feat_in"] = None
    cfg["optim"] = {"name": "adamw", "lr": 1e-3}
    return {**cfg, **changes}


def written(folder, **changes):
    import yaml

    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"max_steps": 100}, "model": section(**changes)}))
    return path


@pytest.mark.parametrize("content, words", [
    ("", "is empty"), ("# only this\n", "is empty"), ("- a\n- b\n", "holds a list"), ("hello\n", "only hello"),
    ("model: [unclosed", "no YAML that can be read"), (b"\xff\xfe\x00" * 9, "no YAML that can be read"),
])
def test_a_yaml_that_is_no_configuration(ask, tmp_path, content, words):
    path = tmp_path / "x.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out = ask("check", "--config", path)
    assert code == 2 and out.startswith(f"Could not examine: {path}") and words in out.splitlines()[0]


@pytest.mark.parametrize("content, words", [
    ("model: null\ntrainer: {max_steps: 9}\n", "model is null"), ("model: [1, 2]\n", "model is a list"),
    ("model: {encoder: conformer}\n", "model.encoder is 'conformer'"), ("encoder: null\n", "encoder is null"),
    ("model: {optim: {lr: 1e-3}}\ntrainer: gpu\n", "trainer is 'gpu'"),
    ("model: {optim: {name: adamw, lr: fast}}\n", "model.optim.lr is 'fast', which is no number"),
    ("trainer: {max_steps: many}\nmodel: {optim: {lr: 1e-3}}\n", "trainer.max_steps is 'many'"),
    ("model: {optim: {lr: '${model.rate}'}}\n", "model.optim.lr is '${model.rate}', and the key that it refers to"),
])
def test_a_section_or_a_value_of_the_wrong_kind_is_named(ask, tmp_path, content, words):
    path = tmp_path / "x.yaml"
    path.write_text(content)
    code, out = ask("check", "--config", path, "--only", "schedule", "limits")
    assert code == 1 and "model-does-not-build" in out.splitlines()[0]
    assert words in " ".join(out.split())


@pytest.mark.parametrize("part, change, words", [
    ("encoder", {"_target_": "nowhere.at.All"}, "nowhere.at.All"),
    ("encoder", {**conformer_encoder(), "feat_in": "x"}, "ConformerEncoder"),
    ("encoder", {**conformer_encoder(), "feat_in": "${model.nothing}"}, "[model.encoder.feat_in]"),
    ("decoder", {"_target_": "nemo.collections.asr.modules.ConvASRDecoder", "num_classes": 28, "vocabulary": 5},
     "model.decoder"),
])
def test_a_model_that_cannot_be_built_is_one_finding(ask, tmp_path, part, change, words):
    code, out = ask("check", "--config", written(tmp_path, **{part: change}), "--only", "outputs")
    assert code == 1 and out.count("PREVENTS LEARNING") == 1 and words in out


@pytest.mark.parametrize("overrides, words", [
    (["nonsense"], "'nonsense' is not KEY=VALUE"),
    (["model.optim.lrr=3"], "no key model.optim.lrr; did you mean model.optim.lr?"),
    (["model.optim.lr.x=3"], "model.optim.lr is a value"),
    (["model.optim.lr=[3"], "cannot be used"),
])
def test_overrides_of_a_yaml_that_cannot_be(ask, tmp_path, overrides, words):
    code, out = ask("check", "--config", written(tmp_path), *overrides, "--only", "schedule")
    assert code == 1 and words in " ".join(out.split())


def test_a_composed_recipe_may_be_given_as_it_is(tmp_path):
    """Hydra's configurations refuse to be asked for what they have not."""
    from recipes.config import compose
    from tools.doctor.engine import examine

    manifest = tiny.write_rows(tmp_path / "train.json", ROWS)
    cfg = compose("conformer", [f"corpus.{role}={manifest}" for role in ("train", "validation")])
    report = examine(config=cfg, families=["limits"], overrides=["model.optim.lr=1e-3"])
    assert report.exit_code == 0 and report.examined
    report = examine(config=cfg, families=["limits"], overrides=["model.optim.lrr=1e-3"])
    assert report.exit_code == 1 and "no key model.optim.lrr" in report.verdict + report.findings[0].symptom


def test_a_section_alone_may_refer_to_the_rest(ask, tmp_path):
    path = tmp_path / "model.yaml"
    path.write_text("optim: {name: adamw, lr: '${trainer.rate}'}\n")
    code, out = ask("check", "--config", path, "--only", "limits")
    assert code == 0 and "nothing says what these are: optim.lr=${trainer.rate}" in " ".join(out.split())


def test_a_new_key_of_a_yaml_takes_a_plus(ask, tmp_path):
    code, out = ask("check", "--config", written(tmp_path), "+trainer.gradient_clip_val=1e-6", "--only", "limits")
    assert code == 1 and "clip-too-low" in out


@pytest.mark.parametrize("arguments, words", [
    (["check", "--config-name", "deepspeach"], "did you mean deepspeech?"),
    (["check", "--config", "{folder}"], "is a folder, not a configuration"),
    (["check", "--model", "{folder}"], "is a folder, not a model"),
    (["check", "--train", "{folder}"], "is a folder, not a manifest (train)"),
    (["check", "--train", "a\0b"], "There is no manifest"),
    (["check", "model.optim.lr=3"], "no configuration that model.optim.lr=3 could change"),
    (["check"], "nothing was given"),
    (["check", "--train", "{manifest}", "--only", "schedule"], "schedule: needs config or model"),
    (["check", "--train", "{manifest}", "--seconds", "-1"], "'-1' is no number of seconds over 0"),
    (["check", "--train", "{manifest}", "--seconds", "soon"], "'soon' is no number of seconds over 0"),
    (["check", "--train", "{manifest}", "--only", "pairs", "--json", "{folder}"], "cannot write {folder}: Is a"),
    (["explain", "/nowhere/run"], "no folder of a run at /nowhere/run"),
    (["explain", "{manifest}"], "is a file, not the folder of a run"),
])
def test_arguments_that_cannot_be(ask, tmp_path, arguments, words):
    manifest = tiny.write_rows(tmp_path / "train.json", ROWS)
    places = {"{folder}": str(tmp_path), "{manifest}": str(manifest)}
    for mark, place in places.items():
        words = words.replace(mark, place)
    code, out = ask(*(places.get(argument, argument) for argument in arguments))
    assert code == 2 and words in " ".join(out.split()), out


def test_what_training_refuses_is_said(ask, tmp_path):
    manifest = tiny.write_rows(tmp_path / "train.json", ROWS)
    data = [f"corpus.{role}={manifest}" for role in ("train", "validation")]
    code, out = ask("check", "--config-name", "deepspeech2", *data, "trainer=cpu", "trainer.sync_batchnorm=true",
                    "--only", "schedule", "limits")
    assert code == 1 and "Training refuses this configuration: trainer.sync_batchnorm=true needs GPUs" in out


# ---- files that are broken -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, content, words", [
    ("a.ckpt", b"this is text\n", "no file of torch's, it begins with b'this is text"), ("a.ckpt", b"", "it is empty"),
    ("a.nemo", b"", "it is empty"), ("a.nemo", b"text", "cannot be restored"),
])
def test_a_model_file_that_is_none(ask, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    code, out = ask("check", "--model", tmp_path / name)
    assert code == 2 and words in out.splitlines()[0] and str(tmp_path / name) in out


def test_a_nemo_file_that_was_cut_off(ask, tmp_path):
    tiny.model().save_to(str(tmp_path / "whole.nemo"))
    content = (tmp_path / "whole.nemo").read_bytes()
    (tmp_path / "cut.nemo").write_bytes(content[: len(content) // 2])
    code, out = ask("check", "--model", tmp_path / "cut.nemo")
    assert code == 2 and "cut.nemo cannot be restored: ReadError: unexpected end of data" in out
    code, out = ask("check", "--model", tmp_path / "whole.nemo", "--device", "gpu7")
    assert code == 2 and "The device 'gpu7' cannot be used" in out
    assert ask("check", "--model", tmp_path / "whole.nemo", "--only", "limits")[0] == 0  # its own configuration


@pytest.mark.parametrize("content, words", [
    ("", "holds no utterance"), ("\n".join([LINES[0], LINES[1][:30], LINES[2]]), "is not JSON"), ("a,b\n1,2\n", "JSON"),
    ("[" + ",\n".join(LINES) + "]", "one JSON object a line"), ('{"audio_filepath": 3, "duration": 1, "text": "a"}\n',
                                                                 "audio_filepath is 3"),
])
def test_a_manifest_that_is_broken(ask, tmp_path, content, words):
    path = tmp_path / "train.json"
    path.write_text(content)
    code, out = ask("check", "--train", path, "--only", "data")
    assert code == 1 and "data-manifest-broken" in out.splitlines()[0] and words in " ".join(out.split())
    usable = content.startswith('{"audio_filepath": "')
    ruled_out = out.partition("Ruled out:")[2].partition("Not examined:")[0]
    assert ("data-channels" in ruled_out) == (usable or "audio_filepath\": 3" in content)


# ---- runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [
    {}, {"curve.csv": b"step,loss\n\x00\x00\xff"}, {"config.yaml": b"a: ["}, {"config.yaml": b""},
    {"doctor/report.json": b'{"findings": 3}'}, {"events.out.tfevents.1.x": b"\x00\x01garbage"},
])
def test_a_folder_without_anything_to_read_is_no_healthy_run(ask, tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    code, out = ask("explain", tmp_path)
    assert code == 2 and out.startswith(f"Could not examine: {tmp_path} holds nothing that a run leaves")
    assert "Ruled out" not in out and all(name in out for name in files)


def test_what_can_be_read_of_a_run_is_and_the_rest_is_a_warning(ask, tmp_path):
    lines = (ROOT / "recipes" / "deepspeech2" / "results" / "mini.csv").read_text().splitlines()
    cut = "\n".join(lines[:100])
    whole, last = cut.rsplit("\n", 1)
    (tmp_path / "curve.csv").write_text(f"{whole}\n{last[: len(last) // 2]}")
    (tmp_path / "config.yaml").write_text("a: [")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_text("text")
    code, out = ask("explain", tmp_path)
    assert code == 0 and out.startswith("Nothing found that prevents learning; 2 warnings")
    assert "config.yaml is no YAML" in out and "last.ckpt: it is no file of torch's" in out


def test_half_a_number_is_not_read(tmp_path):
    from tools.doctor.explain import read_csv

    (tmp_path / "curve.csv").write_text("step,loss\n10,2.5\n20,2.5\n30,0.0")
    assert read_csv(tmp_path / "curve.csv") == {"loss": [(10, 2.5), (20, 2.5)]}


# ---- permissions -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def as_somebody_else():
    """Root may read all: as user nobody."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name, arguments", [
    ("x.yaml", ["check", "--config"]), ("x.nemo", ["check", "--model"]), ("x.ckpt", ["check", "--model"]),
    ("x.json", ["check", "--only", "data", "--train"]), ("folder/x.yaml", ["check", "--config"]),
    ("folder/x.json", ["check", "--only", "data", "--train"]), ("folder", ["explain"]), ("run", ["explain"]),
])
def test_what_may_not_be_read(ask, tmp_path, name, arguments):
    place = tmp_path
    while place != place.parent and place.stat().st_uid == os.getuid():  # the way there is open
        with contextlib.suppress(PermissionError):
            place.chmod(place.stat().st_mode | 0o055)
        place = place.parent
    (tmp_path / "folder").mkdir()
    (tmp_path / "run").mkdir()
    for path in (tmp_path / "run" / "curve.csv", tmp_path / name):
        if path.suffix:
            path.write_text("step,loss\n1,2\n2,3\n")
            path.chmod(0)
    (tmp_path / "folder").chmod(0)
    try:
        with as_somebody_else():
            code, out = ask(*arguments, tmp_path / name)
    finally:
        (tmp_path / "folder").chmod(0o700)
    said = "Permission denied" in out.splitlines()[0] or name == "run" and "that can be read" in out.splitlines()[0]
    assert code == 2 and said, out
