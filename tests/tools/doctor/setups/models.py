"""NeMo CTC models in small, from configurations as they stand in people's YAML files."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

from tests.tools.doctor.setups.tones import LABELS, RATE

HERE = "tests.tools.doctor.setups.encoders"
FEATURES = 32
LIVE_WARMUP = 5  # steps, of models that are trained for 40 to 100; a written recipe has 1000 steps and 50 of warm-up


def preprocessor(**more) -> dict:
    return {"_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor", "sample_rate": RATE,
            "normalize": "per_feature", "window_size": 0.025, "window_stride": 0.01, "window": "hann",
            "features": FEATURES, "n_fft": 512, "dither": 1e-5, "pad_to": 0, **more}


def decoder(feat_in: int | None, labels=LABELS, **more) -> dict:
    return {"_target_": "nemo.collections.asr.modules.ConvASRDecoder", "feat_in": feat_in, "num_classes": len(labels),
            "vocabulary": list(labels), **more}


def spec_augment(**more) -> dict:
    return {"_target_": "nemo.collections.asr.modules.SpectrogramAugmentation", "freq_masks": 1, "freq_width": 4,
            "time_masks": 2, "time_width": 0.03, **more}


def datasets(manifests: dict | None = None, batch_size: int = 8) -> dict:
    """`train_ds` and `validation_ds` of NeMo's own loader."""
    given = {key: value if isinstance(value, str) else value[0] for key, value in (manifests or {}).items()}
    train = {"manifest_filepath": given.get("train"), "sample_rate": RATE, "labels": LABELS, "batch_size": batch_size,
             "shuffle": True, "num_workers": 0, "max_duration": 20.0, "min_duration": 0.1}
    held = {"manifest_filepath": given.get("validation"), "sample_rate": RATE, "labels": LABELS,
            "batch_size": batch_size, "shuffle": False, "num_workers": 0}
    return {"train_ds": train, "validation_ds": held}


def optim(lr: float = 5e-3, **more) -> dict:
    sched = {"name": "CosineAnnealing", "warmup_steps": 50, "min_lr": 1e-5, **more.pop("sched", {})}
    return {"name": "adamw", "lr": lr, "betas": [0.9, 0.98], "weight_decay": 1e-3, "sched": sched, **more}


def trainer(**more) -> dict:
    return {"devices": 1, "accelerator": "cpu", "max_steps": 1000, "max_epochs": -1, "precision": 32,
            "gradient_clip_val": 1.0, "accumulate_grad_batches": 1, "log_every_n_steps": 10, **more}


ENCODERS = {
    "rnn": lambda: {"_target_": f"{HERE}.SpeechRNN", "feat_in": FEATURES},
    "transformer": lambda: {"_target_": f"{HERE}.SpeechTransformer", "feat_in": FEATURES},
    "conv": lambda: {"_target_": f"{HERE}.SpeechConv", "feat_in": FEATURES},
    "conformer": lambda: {
        "_target_": "nemo.collections.asr.modules.ConformerEncoder", "feat_in": FEATURES, "feat_out": -1, "n_layers": 2,
        "d_model": 48, "subsampling": "striding", "subsampling_factor": 4, "subsampling_conv_channels": 24,
        "ff_expansion_factor": 4, "self_attention_model": "rel_pos", "n_heads": 4, "att_context_size": [-1, -1],
        "xscaling": True, "untie_biases": True, "pos_emb_max_len": 2000, "conv_kernel_size": 9,
        "conv_norm_type": "batch_norm", "dropout": 0.0, "dropout_pre_encoder": 0.0, "dropout_emb": 0.0,
        "dropout_att": 0.0},
    "quartznet": lambda: {
        "_target_": "nemo.collections.asr.modules.ConvASREncoder", "feat_in": FEATURES, "activation": "relu",
        "conv_mask": True, "jasper": [_block(64, 11, stride=2), _block(64, 13, residual=True, repeat=2),
                                      _block(64, 15, residual=True, repeat=2), _block(96, 1, separable=False)]},
    "citrinet": lambda: {
        "_target_": "nemo.collections.asr.modules.ConvASREncoder", "feat_in": FEATURES, "activation": "relu",
        "conv_mask": True, "jasper": [_block(64, 5, se=True), _block(64, 7, stride=2, se=True, residual=True),
                                      _block(64, 9, stride=2, se=True, residual=True), _block(96, 1, se=True)]},
    "nemo_rnn": lambda: {
        "_target_": "nemo.collections.asr.modules.RNNEncoder", "feat_in": FEATURES, "n_layers": 2, "d_model": 64,
        "proj_size": 48, "rnn_type": "lstm", "bidirectional": True, "subsampling": "striding", "subsampling_factor": 4,
        "subsampling_conv_channels": 24, "dropout": 0.0},
}
WIDTHS = {"rnn": 48, "transformer": 48, "conv": 48, "conformer": 48, "quartznet": 96, "citrinet": 96, "nemo_rnn": 48}


def _block(filters: int, kernel: int, stride: int = 1, repeat: int = 1, residual: bool = False, separable: bool = True,
           se: bool = False) -> dict:
    block = {"filters": filters, "repeat": repeat, "kernel": [kernel], "stride": [stride], "dilation": [1],
             "dropout": 0.0, "residual": residual, "separable": separable}
    if se:
        block |= {"se": True, "se_context_size": -1}
    if residual and stride > 1:
        block |= {"stride_last": True, "residual_mode": "stride_add"}
    return block


def section(encoder: str | dict = "rnn", manifests: dict | None = None, **more) -> dict:
    """The `model:` section of a healthy configuration; `encoder` by its name above, or as a section of its own."""
    built = ENCODERS[encoder]() if isinstance(encoder, str) else dict(encoder)
    width = WIDTHS.get(encoder) if isinstance(encoder, str) else more.pop("width", 48)
    config = {"sample_rate": RATE, "labels": list(LABELS), "preprocessor": preprocessor(), "encoder": built,
              "decoder": decoder(width), "optim": optim(sched={"warmup_steps": LIVE_WARMUP}),
              "decoding": {"strategy": "greedy_batch"}, **datasets(manifests)}
    return {**config, **more}


def recipe(encoder: str | dict = "rnn", manifests: dict | None = None, trainer_=None, **more) -> dict:
    """A whole configuration, `name`, `model`, `trainer`, as NeMo's training scripts read it."""
    more = {"optim": optim(), **more}
    return {"name": "mine", "model": section(encoder, manifests, **more), "trainer": trainer(**(trainer_ or {}))}


def build(config: dict, seed: int = 0, cls=None):
    """A live NeMo model from a model section, without its data loaders; its configuration keeps all sections."""
    import torch
    from nemo.collections.asr.models import EncDecCTCModel, EncDecCTCModelBPE
    from omegaconf import OmegaConf

    import tests.tools.doctor.setups.encoders  # noqa: F401  makes its classes known to NeMo

    logging.getLogger("nemo_logger").setLevel(logging.ERROR)
    torch.manual_seed(seed)
    config = copy.deepcopy(config)
    for key in ("train_ds", "validation_ds"):
        if config.get(key):
            config[key]["defer_setup"] = True  # loaders are made when a trainer asks for them
    cls = cls or (EncDecCTCModelBPE if config.get("tokenizer") else EncDecCTCModel)
    return cls(cfg=OmegaConf.create(config))


def tokenizer(folder: Path, manifests: dict, size: int) -> dict:
    """Trains a sentencepiece tokenizer on the train manifest; returns the section of the configuration."""
    from manifests.tokenizer import train

    train(list(manifests["train"]), folder / "tokenizer", size)
    return {"dir": str(folder / "tokenizer"), "type": "bpe"}


def bpe(config: dict) -> dict:
    """The section with the decoder and labels of a BPE model."""
    config = copy.deepcopy(config)
    config["decoder"] |= {"num_classes": -1, "vocabulary": []}
    for key in ("train_ds", "validation_ds"):
        config[key].pop("labels")
    config.pop("labels")
    return config
