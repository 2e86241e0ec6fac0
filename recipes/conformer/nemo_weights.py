"""NeMo's stock ConformerEncoder into ours, and weights back.

Every weight of the one has its place in the other. They differ in three layouts only: we keep queries, keys and values
in one matrix, kernels of size 1 as matrices, and what the subsampling hands to its linear layer with channels last.

    model = EncDecCTCModel.restore_from("stock.nemo")
    swap_encoder(model)

Written against nemo_toolkit 3.0.0 (``nemo/collections/asr/modules/conformer_encoder.py``).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from nemo.collections.asr.modules.conformer_encoder import ConformerEncoder as NemoConformerEncoder
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor

from recipes.conformer.convolution import NORMS
from recipes.conformer.encoder import ConformerEncoder
from recipes.conformer.subsampling import FACTORS, KINDS

TARGET = f"{ConformerEncoder.__module__}.{ConformerEncoder.__name__}"

# NeMo's setting: the values that mean the same in ours. What is in neither table nor our constructor is refused too.
SAME_ONLY_FOR = {
    "self_attention_model": ("rel_pos",),
    "att_context_size": (None, [-1, -1], [[-1, -1]]),
    "att_context_style": ("regular",),
    "att_chunk_context_size": (None,),
    "causal_downsampling": (False,),
    "conv_context_style": ("regular",),
    "conv_dual_mode": (False,),
    "conv_norm_type": NORMS,
    "reduction": (None,),
    "stochastic_depth_drop_prob": (0.0,),
    "subsampling": KINDS,
    "subsampling_factor": FACTORS,
}
# These change nothing where the settings above are as they must be: memory, tables, ways to compute the same.
IGNORED = (
    "_target_",
    "att_context_probs",
    "global_attn_separate",
    "global_tokens",
    "global_tokens_spacing",
    "pos_emb_max_len",
    "reduction_factor",
    "reduction_position",
    "stochastic_depth_mode",
    "stochastic_depth_start_layer",
    "subsampling_conv_chunking_factor",
    "sync_max_audio_length",
    "use_pytorch_sdpa",
    "use_pytorch_sdpa_backends",
)

# NeMo's name inside a layer: ours. Queries, keys and values apart.
IN_LAYER = {
    "norm_feed_forward1": "norm_ff1",
    "feed_forward1.linear1": "ff1.linear_in",
    "feed_forward1.linear2": "ff1.linear_out",
    "norm_self_att": "norm_attention",
    "self_attn.linear_pos": "attention.pos",
    "self_attn.linear_out": "attention.out",
    "self_attn.pos_bias_u": "attention.bias_u",
    "self_attn.pos_bias_v": "attention.bias_v",
    "norm_conv": "norm_conv",
    "conv.pointwise_conv1": "conv.pointwise_in",
    "conv.depthwise_conv": "conv.depthwise",
    "conv.batch_norm": "conv.norm",
    "conv.pointwise_conv2": "conv.pointwise_out",
    "norm_feed_forward2": "norm_ff2",
    "feed_forward2.linear1": "ff2.linear_in",
    "feed_forward2.linear2": "ff2.linear_out",
    "norm_out": "norm_out",
}
QKV = ("linear_q", "linear_k", "linear_v")


def conformer_args_from_nemo(cfg: Mapping[str, Any] | DictConfig) -> dict[str, Any]:
    """NeMo's encoder settings (``model.cfg.encoder``) as arguments for our ``ConformerEncoder``.

    What the settings leave out gets NeMo's default, not ours. Raises ValueError, in one line that names the setting,
    for one that our encoder does not have.
    """
    given = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else dict(cfg)
    target = given.get("_target_", "ConformerEncoder")
    if target == TARGET or target.rpartition(".")[2] != NemoConformerEncoder.__name__:
        raise ValueError(f"the encoder is {target}: only NeMo's ConformerEncoder can be converted")
    parameters = list(inspect.signature(NemoConformerEncoder.__init__).parameters.values())[1:]
    settings = {p.name: p.default for p in parameters if p.default is not p.empty} | given
    for name, same in SAME_ONLY_FOR.items():
        value = settings.get(name, same[0])
        if value not in same and value:  # NeMo takes null, false and 0 for the absence of a thing
            raise ValueError(f"{name}={value!r} of NeMo's encoder has no counterpart in ours: it must be {_or(same)}")
    ours = inspect.signature(ConformerEncoder.__init__).parameters
    unknown = sorted(set(settings) - set(ours) - set(SAME_ONLY_FOR) - set(IGNORED))
    if unknown:
        raise ValueError(f"{unknown[0]}={settings[unknown[0]]!r} of NeMo's encoder is not known here: remove it")
    return {name: settings[name] for name in ours if name in settings}


def _or(values: tuple) -> str:
    return " or ".join(map(repr, values))


def from_nemo_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of NeMo's ConformerEncoder as the state of ours.

    Raises ValueError naming a key that belongs to a part which ours does not have.
    """
    separable = _is_separable(state, "pre_encode.conv.3.weight")
    channels = state["pre_encode.conv.0.weight"].shape[0]
    ours: dict[str, Tensor] = {}
    for name, value in state.items():
        layer, _, inside = name.partition(".self_attn.linear_")
        if inside.startswith(("q.", "k.", "v.")):
            kind = inside[2:]
            if inside[0] == "q":
                parts = [state[f"{layer}.self_attn.{part}.{kind}"] for part in QKV]
                ours[f"{layer}.attention.qkv.{kind}"] = torch.cat(parts)
            continue
        new = _rename(name, _names(separable))
        if new == "subsampling.out.weight":
            value = value.unflatten(1, (channels, -1)).transpose(1, 2).flatten(1)
        elif ".conv.pointwise_" in new or new.startswith("subsampling.pointwise."):
            value = value.flatten(1) if new.endswith(".weight") else value
        ours[new] = value
    return ours


def to_nemo_state_dict(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of our ConformerEncoder as the state of NeMo's. Raises ValueError for a key that is not ours."""
    separable = _is_separable(state, "subsampling.pointwise.0.weight")
    names = {ours: theirs for theirs, ours in _names(separable).items()}
    channels = state["subsampling.first.weight"].shape[0]
    theirs: dict[str, Tensor] = {}
    for name, value in state.items():
        if ".attention.qkv." in name:
            layer, _, kind = name.partition(".attention.qkv.")
            theirs |= {f"{layer}.self_attn.{part}.{kind}": third for part, third in zip(QKV, value.chunk(3))}
            continue
        new = _rename(name, names)
        if name == "subsampling.out.weight":
            value = value.unflatten(1, (-1, channels)).transpose(1, 2).flatten(1)
        elif name.endswith(".weight") and ".conv.pointwise_" in name:
            value = value[..., None]
        elif name.endswith(".weight") and name.startswith("subsampling.pointwise."):
            value = value[..., None, None]
        theirs[new] = value
    return theirs


def _is_separable(state: Mapping[str, Tensor], key: str) -> bool:
    return key in state


def _names(separable: bool) -> dict[str, str]:
    """NeMo's name of each part, layers without their number, and ours."""
    names = {"pre_encode.conv.0": "subsampling.first", "pre_encode.out": "subsampling.out", "out_proj": "out_proj"}
    for i in range(max(FACTORS).bit_length() - 2):
        # NeMo counts the activations: conv, ReLU, conv, ReLU or conv, ReLU, depthwise, pointwise, ReLU
        names[f"pre_encode.conv.{2 + 3 * i if separable else 2 + 2 * i}"] = f"subsampling.convs.{i}"
        if separable:
            names[f"pre_encode.conv.{3 + 3 * i}"] = f"subsampling.pointwise.{i}"
    return names | {f"layers.N.{theirs}": f"layers.N.{ours}" for theirs, ours in IN_LAYER.items()}


def _rename(name: str, names: Mapping[str, str]) -> str:
    found = re.match(r"layers\.(\d+)\.", name)
    general = f"layers.N.{name[found.end():]}" if found else name
    part, _, kind = general.rpartition(".")
    if general in names:
        new = names[general]
    elif part in names:
        new = f"{names[part]}.{kind}"
    else:
        raise ValueError(f"{name} is no weight of a Conformer encoder that both sides have")
    return new.replace("layers.N.", f"layers.{found[1]}.", 1) if found else new


def encoder_from_nemo(model) -> ConformerEncoder:
    """Our encoder with the settings and weights of a NeMo CTC model (EncDecCTCModel or EncDecCTCModelBPE).

    On the model's device, in its precision and its mode (training or evaluation). The model stays as it is.
    Raises ValueError where the encoder is not a ConformerEncoder, or has a setting that ours has not.
    """
    encoder = ConformerEncoder(**conformer_args_from_nemo(model.cfg.encoder))
    encoder.load_state_dict(from_nemo_state_dict(model.encoder.state_dict()))
    reference = next(model.encoder.parameters())
    return encoder.to(device=reference.device, dtype=reference.dtype).train(model.encoder.training)


def swap_encoder(model):
    """Put our encoder, with the same weights, in the place of a NeMo CTC model's; returns the model.

    The model's settings name our class from then on, so what it saves is restored with our encoder, wherever
    ``recipes`` is imported. Optimizers made before still hold the old weights: call this first.
    Raises ValueError as ``encoder_from_nemo`` does; the model is then unchanged.
    """
    encoder = encoder_from_nemo(model)
    cfg = model.cfg
    arguments = conformer_args_from_nemo(cfg.encoder)
    with open_dict(cfg):
        cfg.encoder = {"_target_": TARGET, **arguments}
    model.encoder = encoder
    model.cfg = cfg
    model.propagate_model_guid()
    return model
