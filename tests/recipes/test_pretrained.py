"""Small weights for git: half the size, the same transcripts, no trace of where they were trained, found by name."""

import tarfile

import pytest
import torch

from recipes import pretrained
from recipes.options import UsageError, existing_model
from tests.recipes import tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    from omegaconf import open_dict

    folder = tmp_path_factory.mktemp("run")
    model = tiny.model()
    before = model.cfg.copy()
    with open_dict(model.cfg):
        model.cfg.validation_ds = {"manifest_filepath": str(folder / "dev.json"), "defer_setup": True}
    model.save_to(str(folder / "full.nemo"))
    model.cfg = before
    return folder / "full.nemo"


def test_matrices_are_halved_and_the_outputs_stay(saved, tmp_path, capsys):
    from recipes.decode import load_model

    out = tmp_path / "pretrained" / "deepspeech2.nemo"
    assert pretrained.main([str(saved), "--name", "deepspeech2", "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    assert [p.name for p in out.parent.iterdir()] == [out.name]  # nothing half-written beside it
    with tarfile.open(out) as archive:
        names = {name.rsplit("/", 1)[-1]: name for name in archive.getnames()}
        state = torch.load(archive.extractfile(names["model_weights.ckpt"]), weights_only=True)
        config = archive.extractfile(names["model_config.yaml"]).read().decode()
    assert state["decoder.decoder_layers.0.weight"].dtype == torch.float16
    assert state["decoder.decoder_layers.0.bias"].dtype == torch.float32
    assert str(saved.parent) not in config and "validation_ds" not in config

    full, small = load_model(saved), load_model(out)
    assert {p.dtype for p in small.parameters()} == {torch.float32}
    audio = torch.randn(2, 16000, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([16000, 9000])
    for model in (full, small):
        model.preprocessor.featurizer.dither = 0.0
    expected = full(input_signal=audio, input_signal_length=lengths)[0]
    torch.testing.assert_close(small(input_signal=audio, input_signal_length=lengths)[0], expected, atol=0.02, rtol=0)


def test_what_is_too_large_for_git_is_refused_and_leaves_nothing(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrained, "LARGEST", 1000)
    out = tmp_path / "small.nemo"
    assert pretrained.main([str(saved), "--name", "conformer", "--out", str(out)]) == 1
    assert "size=medium" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_recipe_name_stands_for_its_pretrained_model(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "HERE", tmp_path)
    with pytest.raises(UsageError, match="conformer_bpe: no pretrained weights of it here; there are none"):
        existing_model("conformer_bpe")
    path = pretrained.pretrained_path("conformer_bpe")
    path.parent.mkdir(parents=True)
    path.write_bytes(saved.read_bytes())
    assert existing_model("conformer_bpe") == path == tmp_path / "conformer" / "pretrained" / "conformer_bpe.nemo"
    with pytest.raises(UsageError, match="there are conformer_bpe"):
        existing_model("deepspeech")


@pytest.mark.parametrize("name", [name for name in pretrained.FOLDERS if pretrained.pretrained_path(name).is_file()])
def test_what_is_in_the_repository_reads_real_speech(name, librispeech_sample):
    """Utterances that it was trained on: whether weights, labels and features belong together, not how good it is."""
    from manifests.librispeech import build_rows
    from recipes.decode import Decoder, load_model
    from recipes.metrics import count_errors

    rows = build_rows(librispeech_sample, "train-clean-5")[::5]
    model = load_model(pretrained.pretrained_path(name), device="cpu")
    characters = count_errors([row["text"] for row in rows], Decoder(model, rows).run())[1]
    assert characters.rate < 0.35
