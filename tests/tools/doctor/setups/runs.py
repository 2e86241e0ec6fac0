"""Short trainings with Lightning: of anybody's NeMo model, and of our recipes with the files they leave behind."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger


class Losses(Callback):
    """Keeps the loss of each step."""

    def __init__(self):
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        if isinstance(outputs, dict) and "loss" in outputs:
            self.values.append(float(outputs["loss"].detach()))


def fit(model, folder: Path, steps: int, callbacks=(), validate: bool = False, seed: int = 0, **settings) -> str | None:
    """Trains a NeMo model by its own data sections and optimizer; returns how it ended, None for well.

    An error in training is what some faults are about: it is written to `folder/error.txt` and returned.
    """
    seed_everything(seed, verbose=False)
    folder = Path(folder)
    held = {} if validate else {"limit_val_batches": 0}
    options = {"accelerator": "cpu", "devices": 1, "max_steps": steps, "gradient_clip_val": 1.0, "log_every_n_steps": 5,
               "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
               "num_sanity_val_steps": 0, "logger": CSVLogger(folder), "default_root_dir": str(folder),
               **held, **settings}
    trainer = Trainer(callbacks=list(callbacks), **options)
    model.set_trainer(trainer)
    if model._train_dl is None:
        model.setup_training_data(model.cfg.train_ds)
    if validate and not model._validation_dl:
        model.setup_multiple_validation_data(model.cfg.validation_ds)
    try:
        trainer.fit(model)
    except Exception as error:  # whatever the fault leads to
        (folder / "error.txt").write_text(f"{type(error).__name__}: {error}\n")
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def observed(run):
    """`make` of a fault during training: `run(folder, callbacks)` with the doctor's callback, and its report."""

    def make(folder: Path):
        from tools.doctor import Doctor

        doctor = Doctor()
        run(folder, [doctor])
        return doctor.report()

    return make


TINY = {
    "deepspeech": ["model.encoder.hidden=48", "model.encoder.rnn_hidden=48"],
    "deepspeech2": ["model.encoder.conv_channels=[8,8]", "model.encoder.rnn_layers=1", "model.encoder.rnn_hidden=48"],
    "conformer": ["model.encoder.n_layers=2", "model.encoder.d_model=48", "model.encoder.conv_kernel_size=9",
                  "model.encoder.subsampling_conv_channels=16"],
}
TINY["conformer_bpe"] = TINY["conformer"]


def recipe_overrides(recipe: str, given: dict, folder: Path, *more: str) -> list[str]:
    """Overrides that make a recipe tiny, on tone speech; what of `more` sets the same key comes last and wins."""
    overrides = [
        *TINY[recipe], "model.preprocessor.features=32", f"corpus.train={given['train'][0]}",
        f"corpus.validation={given['validation'][0]}", "corpus.bucket_duration_bins=[2.0]", "corpus.freq_width=3",
        "training.global_batch_seconds=32", "model.train_ds.num_workers=0", "trainer.precision=32", "logger=csv",
        f"exp_manager.explicit_log_dir={folder}", "trainer.log_every_n_steps=5", *more,
    ]
    return list({line.split("=")[0]: line for line in overrides}.values())


def compose(recipe: str, given: dict, folder: Path, *more: str):
    """A tiny recipe, composed as train.py does it; BPE gets a tokenizer of 64 tokens from its train manifest."""
    from recipes.config import compose as compose_recipe

    if recipe == "conformer_bpe" and not any(line.startswith("model.tokenizer") for line in more):
        from tests.tools.doctor.setups.models import tokenizer

        more = (*more, f"model.tokenizer.dir={tokenizer(Path(folder), given, 64)['dir']}")
    return compose_recipe(recipe, recipe_overrides(recipe, given, folder, *more))


def train_recipe(cfg, folder: Path, callbacks=(), checkpoint: bool = True):
    """Trains a composed recipe as train.py does and leaves config.yaml, curve.csv and checkpoints; returns the model.

    Without exp_manager, whose folders and signal handlers a test process is better off without. A run that ends
    in an error leaves error.txt too.
    """
    from omegaconf import OmegaConf, open_dict

    from recipes.monitor import Progress
    from recipes.train import build_model, fill_in

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open_dict(cfg):
        fill_in(cfg)
    OmegaConf.save(cfg, folder / "config.yaml", resolve=True)
    seed_everything(cfg.seed, verbose=False)
    progress = Progress(folder, every_n_steps=cfg.trainer.log_every_n_steps, every_seconds=1e9)
    trainer = Trainer(**OmegaConf.to_container(cfg.trainer, resolve=True), callbacks=[progress, *callbacks])
    model = build_model(cfg, trainer)
    try:
        trainer.fit(model)
    except Exception as error:
        (folder / "error.txt").write_text(f"{type(error).__name__}: {error}\n")
    if checkpoint:
        (folder / "checkpoints").mkdir(exist_ok=True)
        torch.save({"state_dict": model.state_dict(), "global_step": trainer.global_step},
                   folder / "checkpoints" / "last.ckpt")
    return model


def curve(folder: Path) -> list[dict]:
    """Rows of curve.csv."""
    with open(Path(folder) / "curve.csv", newline="") as file:
        return list(csv.DictReader(file))
