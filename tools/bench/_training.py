"""Train steps of two encoders with the same weights on the same padded batches, in turns.

Around the encoder both sides are the same: a linear CTC head, the CTC loss in float32, AdamW in one pass, gradients
clipped by norm. The features are made beforehand.

Shapes: B batch, F feature bins, T frames in, t frames out, D channels out, S targets, V labels (blank is index V).
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from recipes.ctc_loss import CTCLoss
from recipes.lengths import valid_mask
from tools.bench._common import (
    BenchError, Cost, describe, fair_clock, peak_memory, ratios, shown, spread, take_turns
)

Encode = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (B, F, T), (B) to (B, D, t), (B)
PRECISIONS = ("32", "bf16-mixed")
# float32 sums in another order: what is left after sixteen blocks
TOLERANCE = 2e-3


class FeatureBatch(NamedTuple):
    """A padded batch: features (B, F, T) and targets (B, S) with their lengths (B); seconds of audio, unpadded."""

    features: Tensor
    lengths: Tensor
    targets: Tensor
    target_lengths: Tensor
    seconds: float

    def to(self, device) -> FeatureBatch:
        return FeatureBatch(*(part.to(device) for part in self[:4]), self.seconds)

    @property
    def padding(self) -> float:
        """Share of the frames that is padding."""
        return 1.0 - float(self.lengths.sum()) / (self.features.shape[0] * self.features.shape[2])


# ---- data --------------------------------------------------------------------------------------------------------


def noise_manifest(folder: Path, utterances: int, durations: tuple[float, float] = (2.0, 16.0), seed: int = 0) -> Path:
    """Quiet noise that stands for speech where no manifest is given: FLAC files and their manifest."""
    import numpy as np
    import soundfile

    generator = np.random.default_rng(seed)
    rows = []
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(utterances):
        seconds = round(float(generator.uniform(*durations)), 2)
        path = folder / f"noise-{i:04}.flac"
        soundfile.write(path, 0.01 * generator.standard_normal(round(seconds * 16000)), 16000, subtype="PCM_16")
        letters = "".join(generator.choice(list("abcdefghij "), size=int(14 * seconds)))
        text = " ".join(letters.split()) or "a"
        rows.append({"audio_filepath": str(path), "duration": seconds, "sampling_rate": 16000, "text": text,
                     "utterance": path.stem})
    manifest = folder / "noise.json"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


@contextlib.contextmanager
def manifest_or_noise(manifest: Path | None, utterances: int = 80, durations: tuple[float, float] = (2.0, 16.0)):
    """The manifest given, or one of noise in a temporary folder. Raises BenchError where the file is not there."""
    if manifest is not None:
        if not manifest.is_file():
            raise BenchError(f"--manifest {manifest}: no such file; build it with python -m manifests.librispeech")
        yield manifest.resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        yield noise_manifest(Path(folder), utterances, durations)


def compose_recipe(recipe: str, corpus: str, manifest: Path, *overrides: str):
    """The recipe's configuration on a manifest, in place of the corpus' own. Raises BenchError."""
    from recipes.config import ConfigError, compose

    quoted = "'" + str(manifest).replace("\\", "\\\\").replace("'", "\\'") + "'"
    try:
        paths = [f"corpus.train={quoted}", f"corpus.validation={quoted}"]
        return compose(recipe, [f"corpus={corpus}", *paths, *overrides])
    except ConfigError as error:
        raise BenchError(str(error)) from None


def train_loader(cfg, batch_seconds: float, cache: bool = False, preprocessor=None):
    """The recipe's own training loader in this process, with batches of `batch_seconds`."""
    from omegaconf import OmegaConf

    from recipes.data import CharEncoder, lhotse_loader

    train = OmegaConf.to_container(cfg.model.train_ds, resolve=True)
    train |= {"batch_duration": batch_seconds, "num_workers": 0, "cache_features": cache}
    return lhotse_loader(train, CharEncoder(cfg.model.labels), 0, 1, preprocessor=preprocessor)


def feature_batches(cfg, batch_seconds: float, count: int) -> list[FeatureBatch]:
    """`count` of the recipe's own batches, in its order and with its padding, repeated where the corpus is small."""
    preprocessor = make_preprocessor(cfg)
    found: list[FeatureBatch] = []
    with torch.no_grad():
        for audio, lengths, targets, target_lengths, _ in train_loader(cfg, batch_seconds):
            features, frames = preprocessor(input_signal=audio, length=lengths)
            seconds = float(lengths.sum()) / cfg.model.sample_rate
            found.append(FeatureBatch(features, frames, targets, target_lengths, seconds))
            if len(found) == count:
                break
    if not found:
        raise BenchError(f"no batch of {batch_seconds:g} s: the manifest's utterances are out of the recipe's range")
    return [found[i % len(found)] for i in range(count)]


def make_preprocessor(cfg):
    """The recipe's features, without dither."""
    from nemo.core.classes.common import Serialization

    return Serialization.from_config_dict(cfg.model.preprocessor).eval()


# ---- one side of the comparison ----------------------------------------------------------------------------------


class Side:
    """An encoder with head, loss and optimizer: one train step a call.

    Args:
        encoder: owns the parameters; `encode` calls it: (B, F, T), (B) to (B, D, t), (B).
        channels, labels: D and V of the head, whose weights follow from the seed 0.
        precision: ``32`` or ``bf16-mixed`` (autocast).
    """

    def __init__(self, encoder: nn.Module, encode: Encode, channels: int, labels: int, device, precision: str = "32",
                 lr: float = 1e-4):
        generator = torch.Generator().manual_seed(0)
        self.head = nn.Linear(channels, labels + 1)
        with torch.no_grad():
            for parameter in self.head.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * channels**-0.5)
        self.encoder, self.encode = encoder.to(device), encode
        self.head = self.head.to(device)
        self.loss, self.device, self.precision = CTCLoss(labels), device, precision
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=lr, betas=(0.9, 0.98), fused=True)

    def parameters(self) -> list[nn.Parameter]:
        return [*self.encoder.parameters(), *self.head.parameters()]

    def log_probs(self, batch: FeatureBatch) -> tuple[Tensor, Tensor]:
        """(B, t, V+1) with lengths (B), in the side's precision."""
        half = self.precision == "bf16-mixed"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            encoded, lengths = self.encode(batch.features, batch.lengths)
            logits = self.head(encoded.transpose(1, 2))
        return logits.float().log_softmax(-1), lengths

    def loss_of(self, batch: FeatureBatch) -> Tensor:
        log_probs, lengths = self.log_probs(batch)
        return self.loss(log_probs, batch.targets, lengths, batch.target_lengths)

    def step(self, batch: FeatureBatch) -> Tensor:
        """Forward, CTC, backward, clipping, optimizer; returns the loss, not yet fetched from the device."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss_of(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()


def check_equal(ours: Side, theirs: Side, batch: FeatureBatch, grads_as_theirs: Callable[[dict], dict] = dict,
                tolerance: float = TOLERANCE) -> dict[str, float]:
    """That both sides compute the same thing, in float32 without dropout: log-probs on real frames and gradients.

    `grads_as_theirs` gives our encoder's gradients by name the names and shapes of theirs. Returns the largest
    differences, as shares of the largest value. Raises BenchError where one is over `tolerance`.
    """
    results = []
    for side in (ours, theirs):
        precision, side.precision = side.precision, "32"
        side.encoder.eval()
        for module in side.encoder.modules():
            if isinstance(module, nn.RNNBase) and not module.dropout:
                module.train()  # cuDNN computes no gradients otherwise
        side.optimizer.zero_grad(set_to_none=True)
        # TF32 would round their pointwise convolutions and not our linear layers, which are the same products.
        with torch.backends.cudnn.flags(allow_tf32=False):
            log_probs, lengths = side.log_probs(batch)
            side.loss(log_probs, batch.targets, lengths, batch.target_lengths).backward()
        grads = {name: parameter.grad for name, parameter in side.encoder.named_parameters(remove_duplicate=False)}
        kept = log_probs.detach() * valid_mask(lengths, log_probs.shape[1])[..., None]
        results.append((kept, lengths, grads_as_theirs(grads) if side is ours else grads))
        side.optimizer.zero_grad(set_to_none=True)
        side.encoder.train()
        side.precision = precision
    (mine, my_lengths, my_grads), (other, their_lengths, their_grads) = results
    if not torch.equal(my_lengths.long(), their_lengths.long()):
        raise BenchError(f"output lengths differ: {my_lengths.tolist()[:4]} and {their_lengths.tolist()[:4]} ...")
    frames = min(mine.shape[1], other.shape[1])
    differences = {"outputs": _difference(mine[:, :frames], other[:, :frames])}
    largest = max(float(grad.abs().max()) for grad in their_grads.values() if grad is not None)
    missing = sorted(name for name, grad in their_grads.items() if grad is not None and my_grads.get(name) is None)
    if missing:
        raise BenchError(f"gradients differ: ours has none for {missing[0]}")
    # against the largest of all: some gradients are nothing but rounding
    gaps = {name: float((my_grads[name] - grad).abs().max()) / largest for name, grad in their_grads.items()
            if grad is not None}
    worst = max(gaps, key=gaps.get)
    differences["gradients"] = gaps[worst]
    for what, difference in differences.items():
        if not difference <= tolerance:
            where = f" ({worst})" if what == "gradients" else ""
            raise BenchError(
                f"{what} differ by {difference:.2g} of their largest value{where}, over {tolerance:g}: "
                "the two sides are not the same network, nothing was measured"
            )
    return differences


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


# ---- measuring ---------------------------------------------------------------------------------------------------


def compare_steps(ours: Side, theirs: Side, batches: Sequence[FeatureBatch], warm: int = 1) -> dict:
    """Costs and ratios of a train step over the batches, and the memory of one on the largest."""
    device = ours.device
    on_device = [batch.to(device) for batch in batches]
    synchronise = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    ways = {"ours": lambda i: ours.step(on_device[i]), "theirs": lambda i: theirs.step(on_device[i])}
    largest = max(on_device, key=lambda batch: batch.features.numel())
    for side in (ours, theirs):  # the state of the optimizer stands before memory is measured
        side.step(largest)
    memory = {}
    for name, side in (("ours", ours), ("theirs", theirs)):
        for each in (ours, theirs):
            each.optimizer.zero_grad(set_to_none=True)
        memory[name] = peak_memory(lambda: side.step(largest), device)
    costs: dict[str, list[Cost]] = take_turns(ways, len(on_device), warm, synchronise)
    clock = fair_clock(device.type, torch.get_num_threads())
    result = {
        "clock": clock,
        "ratio": ratios(costs["theirs"], costs["ours"]),
        "seconds_a_step": {
            name: {kind: spread([getattr(cost, kind) for cost in runs]) for kind in Cost._fields}
            for name, runs in costs.items()
        },
        "peak_bytes": memory,
        "batches": [
            {"utterances": len(batch.lengths), "seconds": round(batch.seconds, 2), "padding": round(batch.padding, 4)}
            for batch in batches
        ],
        "parameters": sum(parameter.numel() for parameter in ours.encoder.parameters()),
    }
    if None not in memory.values():
        result["memory_ratio"] = memory["theirs"] / memory["ours"]
    return result


HEAD = ["", "parameters", "precision", "audio a batch, s", "padding %", "ours, s a step", "theirs, s a step",
        "ours is faster by (quartiles)", "pairs", "ours, peak GiB", "theirs, peak GiB", "outputs differ by"]


def table_row(name: str, case: dict) -> list[str]:
    """One comparison as a row under HEAD."""
    clock, seconds = case["clock"], case["seconds_a_step"]
    total = sum(batch["seconds"] for batch in case["batches"])
    padding = sum(batch["padding"] for batch in case["batches"]) / len(case["batches"])
    peaks = [f"{case['peak_bytes'][side] / 2**30:.2f}" if case["peak_bytes"][side] is not None else "-"
             for side in ("ours", "theirs")]
    return [
        name, f"{case['parameters'] / 1e6:.1f} M", case["precision"], f"{total / len(case['batches']):.0f}",
        f"{100 * padding:.1f}", *(f"{seconds[side][clock]['median']:.3f}" for side in ("ours", "theirs")),
        shown(case["ratio"][clock]), str(len(case["batches"])), *peaks, f"{case['equal']['outputs']:.1g}",
    ]


def remark(clock: str) -> str:
    """What the columns mean."""
    time = "CPU time" if clock == "cpu" else "time by the clock"
    return (f"A step is forward, CTC, backward, clipping and AdamW; {time}, medians; ratios within pairs on the same "
            "batch. Peak memory is what a step takes on the largest batch beyond weights and optimizer state.")


def start(device_name: str):
    """(device, its description) after the recipe's own threads and NeMo's silence have been set."""
    from recipes.decode import ModelError, pick_device
    from recipes.quiet import quiet_nemo

    quiet_nemo()
    try:
        device = pick_device(device_name)
    except ModelError as error:
        raise BenchError(str(error)) from None
    text = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return device, describe(text, torch.get_num_threads())


def precision_of(name: str, device) -> str:
    """`auto` is what the recipe trains in on that device."""
    from recipes.config import cpu_precision

    if name != "auto":
        return name
    return cpu_precision() if device.type == "cpu" else "bf16-mixed"



def recipe_side(cfg, device, precision: str) -> Side:
    """A side with the encoder of a recipe's configuration."""
    from nemo.core.classes.common import Serialization

    torch.manual_seed(0)
    encoder = Serialization.from_config_dict(cfg.model.encoder)

    def encode(features, lengths):
        return encoder(audio_signal=features, length=lengths)

    return Side(encoder, encode, encoder._feat_out, len(cfg.model.labels), device, precision)
