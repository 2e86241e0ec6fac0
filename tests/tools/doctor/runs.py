"""Tiny runs for the tests of the callback and of explain: tones for letters, small models, a Lightning trainer on the
CPU."""

import json
from functools import lru_cache
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn

from tools.doctor.callback import Doctor

LABELS = [" ", *"abcdefghij"]
BLANK = len(LABELS)
FEATURES = 16
FRAMES = 5  # of features that a letter lasts


def tones(count: int, seed: int = 0, letters: int = 7, frames: int = FRAMES):
    """`count` pairs of features (T, 16) and targets: a letter lights up its own feature for some frames."""
    generator = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        target = generator.integers(0, len(LABELS), size=letters)
        x = 0.3 * generator.standard_normal((letters * frames, FEATURES)).astype(np.float32)
        for at, label in enumerate(target):
            x[at * frames + 1: (at + 1) * frames, label] += 2.0
        pairs.append((torch.from_numpy(x), torch.from_numpy(target)))
    return pairs


def collate(items):
    features = nn.utils.rnn.pad_sequence([x for x, _, _ in items], batch_first=True)
    targets = nn.utils.rnn.pad_sequence([y for _, y, _ in items], batch_first=True)
    lengths = [torch.tensor([len(item[k]) for item in items]) for k in (0, 1)]
    return features, lengths[0], targets, lengths[1], [name for _, _, name in items]


class Plain(pl.LightningModule):
    """Any LightningModule with a CTC loss: `encoder` maps features (B, T, 16) to (B, T', D)."""

    def __init__(self, encoder: nn.Module, width: int, lr: float = 3e-3, stride: int = 1, zero_infinity: bool = True,
                 warmup: int = 0, labels=LABELS):
        super().__init__()
        self.encoder = encoder
        self.output = nn.Linear(width, BLANK + 1)
        self.lr, self.stride, self.warmup = lr, stride, warmup
        self.labels = list(labels)
        self.loss = nn.CTCLoss(blank=BLANK, zero_infinity=zero_infinity)

    def forward(self, x):
        y = self.encoder(x)
        return self.output(y[0] if isinstance(y, tuple) else y).log_softmax(dim=-1)

    def compute(self, batch):
        x, lengths, targets, target_lengths = batch[:4]
        log_probs = self(x)
        lengths = torch.div(lengths, self.stride, rounding_mode="floor").clamp(max=log_probs.shape[1])
        return self.loss(log_probs.transpose(0, 1), targets, lengths, target_lengths), log_probs, lengths

    def training_step(self, batch, batch_idx):
        loss = self.compute(batch)[0]
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.lr)
        if not self.warmup:
            return optimizer
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / self.warmup, 1.0))
        schedule.warmup_steps = self.warmup
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loader(pairs, batch: int = 8, shuffle: bool = True):
    named = [(x, y, f"tone-{k}") for k, (x, y) in enumerate(pairs)]
    return torch.utils.data.DataLoader(named, batch_size=batch, shuffle=shuffle, collate_fn=collate)


def fit(model, data, folder, steps: int = 60, validation=None, clip: float | None = 1.0, seed: int = 0, **doctor):
    """Trains; returns the callback. Errors of the run are raised."""
    pl.seed_everything(seed, verbose=False)
    watcher = Doctor(folder=folder, **doctor)
    validates = validation is not None or getattr(model, "_validation_dl", None) is not None
    trainer = pl.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, gradient_clip_val=clip, callbacks=[watcher],
        check_val_every_n_epoch=None, val_check_interval=steps // 2 if validates else 1_000_000,
        log_every_n_steps=1,
    )
    trainer.fit(model, data, validation)
    return watcher


def write_curve(folder: Path, rows: list[dict], config: dict | None = None) -> Path:
    """A run's folder with curve.csv as the recipes write it, and config.yaml."""
    from recipes.monitor import COLUMNS

    folder.mkdir(parents=True, exist_ok=True)
    lines = [",".join(COLUMNS)] + [",".join(str(row.get(name, "")) for name in COLUMNS) for row in rows]
    (folder / "curve.csv").write_text("\n".join(lines) + "\n")
    if config is not None:
        (folder / "config.yaml").write_text(json.dumps(config))
    return folder


@lru_cache(maxsize=1)
def speech():
    """256 pairs of tones, shared: leave them as they are."""
    return tuple(tones(256))


# ---- NeMo's own model, on sound ----------------------------------------------------------------------------------

RATE = 16000


def tone_manifest(folder: Path, count: int = 24, seconds: float = 0.08, upper: bool = False, letters: int = 9,
                  seed: int = 1, context: bool = False) -> Path:
    """Recordings of tones, one frequency a letter for so many seconds, with words of 3 letters; returns the manifest.

    With `context` a letter is two tones of three, one after the other: each alone says little.
    """
    import soundfile

    generator = np.random.default_rng(seed)
    rows = []
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        text = "".join(generator.choice(list("abcdefgh"), size=letters - 2))
        text = f"{text[:3]} {text[3:6]} {text[6:]}".strip()
        t = np.arange(int(seconds * RATE)) / RATE
        sound = np.concatenate([(c != " ") * 0.3 * np.sin(2 * np.pi * 300 * (2 + ord(c) % 32) * t) for c in text])
        if context:
            half = t[: len(t) // 2]
            numbers = [tone for c in text for tone in divmod(ord(c) % 32, 3)]
            sound = np.concatenate([0.3 * np.sin(2 * np.pi * (500 + 900 * tone) * half) for tone in numbers])
        sound += 0.01 * generator.standard_normal(len(sound))
        soundfile.write(folder / f"tone-{k}.wav", sound.astype("float32"), RATE)
        rows.append({"audio_filepath": str(folder / f"tone-{k}.wav"), "duration": len(sound) / RATE,
                     "text": text.upper() if upper else text})
    path = folder / "train.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def stock(manifest: Path, encoder: dict, width: int, optim: dict, batch: int = 8, validation: Path | None = None):
    """NeMo's EncDecCTCModel over lower-case letters, with its own loader and loss."""
    from nemo.collections.asr.models import EncDecCTCModel
    from omegaconf import OmegaConf

    labels = [" ", *"abcdefghijklmnopqrstuvwxyz", "'"]
    data = {"manifest_filepath": str(manifest), "sample_rate": RATE, "labels": labels, "batch_size": batch,
        "shuffle": True,
            "num_workers": 0}
    held = {**data, "manifest_filepath": str(validation), "shuffle": False}
    cfg = OmegaConf.create({
        **({"validation_ds": held} if validation else {}),
        "sample_rate": RATE, "labels": labels, "train_ds": data,
        "preprocessor": {"_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor", "features": 16,
                         "sample_rate": RATE, "window_size": 0.025, "window_stride": 0.01, "n_fft": 512, "dither": 1e-5,
                         "normalize": "per_feature", "pad_to": 0},
        "encoder": encoder,
        "decoder": {"_target_": "nemo.collections.asr.modules.ConvASRDecoder", "feat_in": width,
                    "num_classes": len(labels), "vocabulary": labels},
        "optim": optim,
    })
    return EncDecCTCModel(cfg)


def conformer_encoder(width: int = 32, layers: int = 1) -> dict:
    return {"_target_": "nemo.collections.asr.modules.ConformerEncoder", "feat_in": 16, "n_layers": layers,
            "d_model": width, "n_heads": 4, "subsampling_factor": 4, "subsampling": "striding",
            "subsampling_conv_channels": 8,
            "conv_kernel_size": 7, "dropout": 0.0, "dropout_emb": 0.0, "dropout_att": 0.0, "dropout_pre_encoder": 0.0}


def noam(width: int, warmup: int, lr: float = 2.0) -> dict:
    return {"name": "adamw", "lr": lr, "betas": [0.9, 0.98], "weight_decay": 1e-3,
            "sched": {"name": "NoamAnnealing", "d_model": width, "warmup_steps": warmup, "min_lr": 1e-6}}
