"""Our Conformer against NeMo's: same weights, same outputs and gradients; a stock model takes our encoder."""

import os

import pytest
import torch
from nemo.collections.asr.models import EncDecCTCModel
from nemo.collections.asr.modules.conformer_encoder import ConformerEncoder as NemoConformerEncoder
from nemo.core.classes.mixins import AccessMixin
from omegaconf import OmegaConf
from torch.testing import assert_close

from recipes.conformer.encoder import ConformerEncoder
from recipes.conformer.nemo_weights import (
    TARGET,
    conformer_args_from_nemo,
    encoder_from_nemo,
    from_nemo_state_dict,
    swap_encoder,
    to_nemo_state_dict,
)
from recipes.lengths import valid_mask

NO_DROPOUT = {"dropout": 0.0, "dropout_pre_encoder": 0.0, "dropout_emb": 0.0, "dropout_att": 0.0}
SETTINGS = {
    "defaults": {},
    "dw_striding_8x": {"subsampling": "dw_striding", "subsampling_factor": 8, "subsampling_conv_channels": 12},
    "striding_8x_no_xscaling": {"subsampling_factor": 8, "subsampling_conv_channels": 6, "xscaling": False},
    "layer_norm_tied": {"conv_norm_type": "layer_norm", "untie_biases": False, "d_model": 36, "n_heads": 2},
    "causal_projected": {
        "conv_context_size": "causal",
        "feat_out": 10,
        "subsampling_factor": 2,
        "ff_expansion_factor": 2,
    },
    "no_bias_asymmetric": {"use_bias": False, "conv_context_size": [5, 3], "subsampling": "dw_striding", "n_layers": 3},
}


def pair(seed=0, **changes):
    """NeMo's encoder with random weights, statistics included, and ours with the same."""
    torch.manual_seed(seed)
    small = {"feat_in": 20, "n_layers": 2, "d_model": 32, "n_heads": 4, "conv_kernel_size": 9}
    settings = {**small, **NO_DROPOUT, **changes}
    theirs = NemoConformerEncoder(**settings)
    for name, tensor in theirs.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0)
        elif tensor.is_floating_point():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    ours = ConformerEncoder(**conformer_args_from_nemo(settings))
    ours.load_state_dict(from_nemo_state_dict(theirs.state_dict()))
    return theirs, ours


def compare(theirs, ours, lengths, frames, tolerance=1e-4):
    """Outputs on real frames, lengths, and the gradients of input and parameters."""
    torch.manual_seed(1)
    length_B = torch.tensor(lengths)
    features = torch.randn(len(lengths), 20, frames, dtype=next(ours.parameters()).dtype)
    results = []
    for encoder in (theirs, ours):
        encoder.zero_grad()
        x_BFT = features.clone().requires_grad_()
        outputs, encoded = encoder(audio_signal=x_BFT, length=length_B)
        outputs = outputs * valid_mask(encoded, outputs.shape[2])[:, None]
        torch.manual_seed(2)
        (outputs * torch.randn_like(outputs)).sum().backward()
        gradients = {name: p.grad for name, p in encoder.named_parameters(remove_duplicate=False)}
        if encoder is ours:
            gradients = to_nemo_state_dict(gradients)
        results.append({"outputs": outputs, "lengths": encoded, "input": x_BFT.grad, **gradients})
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        if theirs.training and name.endswith("depthwise_conv.bias") and expected.dtype == torch.float32:
            continue  # the normalisation after it takes a constant away: this gradient is nothing but rounding
        text = name + ": {}"
        assert_close(results[1][name], expected, atol=tolerance, rtol=tolerance, msg=text.format)


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_same_outputs_and_gradients(changes):
    theirs, ours = pair(**changes)
    theirs.eval(), ours.eval()
    compare(theirs, ours, [77, 50, 33, 9, 1], frames=90)
    theirs.train(), ours.train()
    if changes.get("conv_norm_type") == "layer_norm":
        compare(theirs, ours, [77, 50, 33, 9, 1], frames=90)
        return
    # in training NeMo's BatchNorm counts padding as frames, ours does not: the same where there is none
    compare(theirs, ours, [64, 64, 64], frames=64)
    for name, buffer in to_nemo_state_dict(ours.state_dict()).items():
        if "running" in name or "tracked" in name:
            assert_close(buffer, theirs.state_dict()[name], atol=1e-5, rtol=1e-4)


def test_same_to_the_last_digits_in_double_precision():
    theirs, ours = pair(subsampling="dw_striding")
    theirs.double(), ours.double()
    for mode, lengths in ((False, [77, 50, 9]), (True, [90, 90, 90])):
        theirs.train(mode), ours.train(mode)
        compare(theirs, ours, lengths, frames=90, tolerance=1e-9)


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_state_goes_there_and_back(changes):
    theirs, ours = pair(**changes)
    back = to_nemo_state_dict(ours.state_dict())
    assert list(back.keys() ^ theirs.state_dict().keys()) == []
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.state_dict().items())
    theirs.load_state_dict(back)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("att_context_size", [70, 13]),
        ("att_context_style", "chunked_limited"),
        ("self_attention_model", "abs_pos"),
        ("causal_downsampling", True),
        ("reduction", "pooling"),
        ("subsampling", "stacking"),
        ("subsampling_factor", 1),
        ("conv_norm_type", "instance_norm"),
        ("conv_context_style", "dcc"),
        ("stochastic_depth_drop_prob", 0.1),
        ("invented", 3),
    ],
)
def test_settings_without_counterpart(setting, value):
    cfg = OmegaConf.create({"feat_in": 80, "n_layers": 1, "d_model": 8, setting: value})
    with pytest.raises(ValueError) as error:
        conformer_args_from_nemo(cfg)
    assert f"{setting}={value!r}" in str(error.value) and "\n" not in str(error.value)


def test_what_is_left_out_has_nemos_default():
    args = conformer_args_from_nemo({"feat_in": 80, "n_layers": 1, "d_model": 8, "att_context_size": [-1, -1]})
    assert args["xscaling"] is True and args["dropout_emb"] == 0.1 and args["subsampling"] == "striding"
    with pytest.raises(ValueError, match="SqueezeformerEncoder"):
        conformer_args_from_nemo({"_target_": "nemo.collections.asr.modules.SqueezeformerEncoder", "feat_in": 80})


def test_foreign_weights_are_named():
    state = dict(NemoConformerEncoder(feat_in=20, n_layers=1, d_model=8, n_heads=2).state_dict())
    with pytest.raises(ValueError, match="layers.0.adapter.weight"):
        from_nemo_state_dict({**state, "layers.0.adapter.weight": torch.zeros(1)})


@pytest.fixture
def stock_model():
    labels = [" ", *"abcdefghijklmnopqrstuvwxyz", "'"]
    encoder = {"feat_in": 80, "n_layers": 2, "d_model": 16, "n_heads": 2, "conv_kernel_size": 5}
    cfg = {
        "sample_rate": 16000,
        "labels": labels,
        "preprocessor": {
            "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
            "features": 80,
            "dither": 0.0,
        },
        "encoder": {"_target_": "nemo.collections.asr.modules.ConformerEncoder", **encoder},
        "decoder": {
            "_target_": "nemo.collections.asr.modules.ConvASRDecoder",
            "feat_in": 16,
            "num_classes": len(labels),
            "vocabulary": labels,
        },
        "interctc": {"loss_weights": [0.3], "apply_at_layers": [0]},
    }
    torch.manual_seed(0)
    return EncDecCTCModel(OmegaConf.create(cfg)).eval()


def test_a_stock_model_takes_our_encoder(stock_model, tmp_path):
    torch.manual_seed(0)
    audio = {"input_signal": torch.randn(3, 12000) * 0.1, "input_signal_length": torch.tensor([12000, 9000, 4000])}
    expected = stock_model(**audio)
    assert not encoder_from_nemo(stock_model).training
    model = swap_encoder(stock_model)
    assert type(model.encoder) is ConformerEncoder and model.cfg.encoder._target_ == TARGET
    for restored in (model, restored_from(model, os.fspath(tmp_path / "ours.nemo"))):
        assert type(restored.encoder) is ConformerEncoder
        got = restored(**audio)
        for b, frames in enumerate(expected[1].tolist()):
            assert got[1][b] == frames
            assert_close(got[0][b, :frames], expected[0][b, :frames], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="only NeMo's"):
        swap_encoder(model)


def test_training_starts_from_a_stock_models_weights(stock_model, tmp_path):
    from recipes.config import ConfigError
    from recipes.ctc_model import CTCModel
    from recipes.train import load_weights

    path = os.fspath(tmp_path / "stock.nemo")
    stock_model.save_to(path)
    cfg = swap_encoder(stock_model).cfg.copy()
    ours = CTCModel(cfg).eval()
    load_weights(ours, path)
    for name, value in stock_model.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    cfg.encoder.d_model = cfg.decoder.feat_in = 24
    with pytest.raises(ConfigError, match="its weights fit 0% of this model's encoder"):
        load_weights(CTCModel(cfg), path)


def restored_from(model, path):
    model.save_to(path)
    return EncDecCTCModel.restore_from(path).eval()


def test_intermediate_ctc_finds_its_layers(stock_model):
    torch.manual_seed(0)
    features, length = torch.randn(2, 80, 60), torch.tensor([60, 35])
    captured = []
    for model in (stock_model, swap_encoder(stock_model)):
        AccessMixin.set_access_enabled(access_enabled=True, guid=model.model_guid)
        model.encoder(audio_signal=features, length=length)
        [(log_probs, lengths)] = model.get_captured_interctc_tensors()
        captured.append((log_probs[0], log_probs[1, : lengths[1]], lengths))
        model.encoder.reset_registry()
        assert not AccessMixin.is_access_enabled(model.model_guid)
        model.encoder(audio_signal=features, length=length)
        assert not AccessMixin.get_module_registry(model.encoder)
    for ours, theirs in zip(captured[1], captured[0]):
        assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
