"""A live NeMo CTC model as the probes use it: run on inputs of their choosing, and left exactly as it was found.

Shapes: B batch, D features (mel bins), T frames, V labels; lengths (B).
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tools.doctor.registry import NotExamined

DROPOUTS = {"dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "alpha_dropout_",
            "feature_dropout", "feature_dropout_", "feature_alpha_dropout"}
# Attributes of a model, other than plain values, that a step or the making of an optimizer replaces.
HELD = (
    "_optimizer", "_scheduler", "_optimizer_param_groups", "step_stats", "infeasible_seen", "_statistics", "_trainer"
)
SPEECH_FRAMES = (190, 320, 250, 280)  # of made-up items, when there is no audio: lengths differ on purpose
HALF = (torch.float16, torch.bfloat16)
SHORTEST = 0.8  # seconds of an utterance to probe with


def unregistered(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> trainable parameter of modules that lie in lists, tuples and dicts of the model's modules, and of which
    the model's parameters() knows nothing."""
    own = {id(p) for p in model.parameters()}
    found: dict[str, nn.Parameter] = {}
    for place, module in model.named_modules():
        for name, value in vars(module).items():
            held = dict(enumerate(value)) if type(value) in (list, tuple) else value
            for key, item in held.items() if isinstance(held, dict) else ():
                if isinstance(item, nn.Module):
                    found |= {f"{place}.{name}.{key}.{inner}".lstrip("."): p for inner, p in item.named_parameters()
                              if id(p) not in own and p.requires_grad}
    return found


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """On leaving, everything is as it was: parameters, buffers, gradients, modes, attributes, random state."""
    every = [*model.parameters(), *unregistered(model).values()]
    parameters = {p: (p.detach().clone(), p.requires_grad, p.grad) for p in every}
    buffers = [(module, name, buffer, None if buffer is None else buffer.clone())
               for module in model.modules() for name, buffer in module._buffers.items()]
    modes = [(module, module.training) for module in model.modules()]
    plain = [(module, {k: v for k, v in vars(module).items()
                       if isinstance(v, (int, float, str, bool, type(None), Tensor))}, set(vars(module)))
             for module in model.modules()]
    held = {name: vars(model).get(name) for name in HELD}
    held["infeasible_seen"] = set(held["infeasible_seen"]) if held["infeasible_seen"] is not None else None
    own = [(value, value.bit_generator.state if isinstance(value, np.random.Generator) else value.getstate())
           for module in model.modules() for value in vars(module).values()
           if isinstance(value, (np.random.Generator, random.Random))]
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    gradients = torch.is_grad_enabled()
    for p in parameters:
        p.grad = None
    try:
        yield
    finally:
        torch.set_grad_enabled(gradients)
        with torch.no_grad():
            for p, (value, required, grad) in parameters.items():
                if not torch.equal(p, value):
                    p.copy_(value)
                p.requires_grad_(required)
                p.grad = grad
            for module, name, buffer, value in buffers:
                if buffer is not None:
                    # A buffer that grew (positional encodings) is put back whole.
                    buffer.copy_(value) if buffer.shape == value.shape else buffer.set_(value)
                module._buffers[name] = buffer
        for module, values, names in plain:
            for name, value in values.items():
                object.__setattr__(module, name, value) if vars(module).get(name, value) is not value else None
            for name in [name for name, value in vars(module).items() if name not in names and keeps_tensors(value)]:
                object.__delattr__(module, name)  # a state that is kept from call to call
        for module, mode in modes:
            module.training = mode
        for name, value in held.items():
            if name in vars(model) or value is not None:
                object.__setattr__(model, name, value)
        for generator, held_state in own:
            if isinstance(generator, np.random.Generator):
                generator.bit_generator.state = held_state
            else:
                generator.setstate(held_state)
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def keeps_tensors(value) -> bool:
    """Whether a value is a tensor, or holds nothing else."""
    if isinstance(value, (tuple, list)):
        return bool(value) and all(keeps_tensors(item) for item in value)
    return isinstance(value, Tensor)


@dataclass
class Item:
    """One utterance to probe with: samples, and its text and row where it is real."""

    audio: np.ndarray
    text: str = ""
    row: dict[str, Any] = field(default_factory=dict)


class Probe:
    """A model and what the probes ask of it.

    Attributes:
        model: the live model.
        device: where it is run.
        labels: characters in the order of the outputs, None for sub-word tokens.
        vocabulary: labels or tokens in the order of the outputs.
        subject: for its rows and settings.
    """

    def __init__(self, model, subject, device=None, own: bool = True):
        self.model, self.subject = model, subject
        parameter = next(model.parameters(), None)
        here = torch.device("cpu") if parameter is None else parameter.device
        self.device = torch.device(device) if device is not None else here
        if own:
            model.to(self.device)
        else:
            self.device = here  # a live model stays where it is
        vocabulary = getattr(getattr(model, "decoder", None), "vocabulary", None)
        self.vocabulary = [str(label) for label in vocabulary] if vocabulary is not None else []
        self.labels = None if getattr(model, "tokenizer", None) is not None or not self.vocabulary else self.vocabulary
        self._features: tuple[Tensor, Tensor] | None = None
        self._repeats: bool | None = None
        self._awake: list[tuple[nn.Parameter, Tensor]] | None = None

    # ---- inputs --------------------------------------------------------------------------------------------

    @property
    def sample_rate(self) -> int:
        return int(getattr(getattr(self.model, "preprocessor", None), "_sample_rate", 0) or self.subject.sample_rate)

    @property
    def feature_width(self) -> int:
        """Mel bins that the encoder takes."""
        for part, name in (("encoder", "_feat_in"), ("preprocessor", "_features")):
            value = getattr(getattr(self.model, part, None), name, None)
            if isinstance(value, int) and value > 0:
                return value
        return int(self.subject.settings.number("model.preprocessor.features", 80)) if self.subject.settings else 80

    def items(self, count: int = 4, longest: float = 6.0) -> list[Item]:
        """Utterances of the training manifest, spread over it and of different lengths; where it has too few of at most
        `longest` seconds, the beginnings of longer ones, without their text; made-up sound for what is lacking still."""
        rows = [row for row in self.subject.rows.get("train", []) or next(iter(self.subject.rows.values()), [])
                if SHORTEST <= row["duration"] and row["text"].strip()]
        found = self._read([row for row in rows if row["duration"] <= longest], count)
        if len(found) < count:
            cut = [{**row, "duration": longest * (0.7 + 0.3 * (k % 7) / 6), "offset": row.get("offset", 0), "text": ""}
                   for k, row in enumerate(rows) if row["duration"] > longest]
            found += self._read(cut, count - len(found))
        made = [Item(made_up_sound(frames * self.sample_rate // 100, self.sample_rate, seed), "")
                for seed, frames in enumerate(SPEECH_FRAMES * (count // 4 + 1))]
        return found + made[: count - len(found)]

    def _read(self, rows: list[dict], count: int) -> list[Item]:
        """At most so many items of rows drawn from these: of those whose audio can be read and is not silent."""
        from tools.doctor.audio import read_at

        found = []
        for i in random.Random(self.subject.seed).sample(range(len(rows)), min(len(rows), 6 * count)):
            if len(found) == count:
                break
            try:
                samples = read_at(rows[i], self.sample_rate)
            except (RuntimeError, ValueError):
                continue  # the data family says so
            if np.isfinite(samples).all() and np.abs(samples).max() > 1e-4:
                found.append(Item(samples, rows[i]["text"], rows[i]))
        return found

    def audio_batch(self, items: list[Item]) -> tuple[Tensor, Tensor]:
        """Padded (B, samples) float32 and lengths (B)."""
        lengths = torch.tensor([len(item.audio) for item in items])
        batch = torch.zeros(len(items), int(lengths.max()))
        for row, item in enumerate(items):
            batch[row, : len(item.audio)] = torch.from_numpy(np.ascontiguousarray(item.audio, dtype=np.float32))
        return batch.to(self.device), lengths.to(self.device)

    def features(self) -> tuple[Tensor, Tensor]:
        """Features (B, D, T) of four items, padding zero, and lengths (B): the preprocessor's where they are usable.

        Where they are not finite, or all the same, noise that varies as speech does stands in: the features family
        says what is wrong with them, and the encoder is examined all the same.
        """
        if self._features is None:
            x, lengths = None, None
            try:
                with untouched(self.model), torch.no_grad():
                    self.model.eval()
                    audio, audio_lengths = self.audio_batch(self.items())
                    x, lengths = self.model.preprocessor(input_signal=audio, length=audio_lengths)
                    x = x.detach().float()[:, :, : int(lengths.max())].clone()
                    lengths = lengths.detach().long().clone()
            except Exception:  # a preprocessor of any kind
                x = None
            usable = x is not None and x.dim() == 3 and x.shape[1] == self.feature_width and int(lengths.min()) >= 40
            if usable:
                scale = float(x.std())
                usable = bool(torch.isfinite(x).all()) and 0.05 < scale < 50
            if not usable:
                x, lengths = self.made_up_features(SPEECH_FRAMES)
            mask = torch.arange(x.shape[2], device=x.device)[None, None, :] < lengths[:, None, None]
            self._features = x * mask, lengths
        return self._features

    def made_up_features(self, frames, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Normalised noise that is alike over some frames and mel bins, (B, D, T), lengths (B)."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(len(frames), self.feature_width, max(frames), generator=generator)
        x = nn.functional.avg_pool1d(x, 5, 1, 2, count_include_pad=False)
        x = nn.functional.avg_pool1d(x.transpose(1, 2), 3, 1, 1, count_include_pad=False).transpose(1, 2)
        x = (x - x.mean(dim=2, keepdim=True)) / x.std(dim=2, keepdim=True)
        return x.to(self.device), torch.tensor(list(frames), device=self.device)

    # ---- running -------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, D, T), lengths (B) to (log-probs (B, T', V+1) float32, lengths (B)), in the current mode."""
        encoder = getattr(self.model, "encoder", self.model)
        weight = next((p for p in encoder.parameters() if p.is_floating_point()), None)
        # A preprocessor gives features of the model's own precision; those made up here are float32.
        x = x if weight is None else x.to(weight.dtype)
        out = self.model.forward(processed_signal=x, processed_signal_length=lengths)
        return out[0].float(), out[1]

    def must_repeat(self) -> None:
        """Raises NotExamined where the same input gives different outputs in eval mode: no probe can compare then."""
        if self._repeats is None:
            with self.ready(), torch.no_grad():
                x, lengths = self.features()
                one, two = self.forward(x, lengths)[0], self.forward(x, lengths)[0]
                self._repeats = one.shape == two.shape and not relative(one - two, one) > 1e-3
        if not self._repeats:
            raise NotExamined("outputs in eval mode are random")

    @contextlib.contextmanager
    def ready(self, train: bool = False, calibrate: bool = True, own_dropout: bool = False) -> Iterator[None]:
        """`untouched`, without chance (dropout, masks, dither), in eval mode or train mode, and in float32: the rounding of
        half precision is larger than the differences that the probes look for.

        `own_dropout` True leaves dropouts on that are not torch's.

        A fresh model's running statistics are those of nothing: with `calibrate` they are first set to those of the
        probe's own batch, as training would set them.
        """
        with untouched(self.model):
            seed_all(0)
            self.model.train()
            undo = without_chance(self.model, own=not own_dropout)
            try:
                in_full_precision(self.model, undo)
                if calibrate and not train and any("running_mean" in name for name, _ in self.model.named_buffers()):
                    self.calibrate()
                self._wake_up()
                self.model.train(train)
                for module in self.model.modules():
                    if type(module) in (nn.GRU, nn.LSTM, nn.RNN):  # the same in both modes without dropout, and cuDNN
                        module.train()  # computes gradients in training mode only
                with NoDropout():
                    yield
            finally:
                for call in undo:
                    call()

    def _wake_up(self) -> None:
        """Puts a projection that begins with weights of 0, through which nothing comes yet, behind its first small step.

        So a decoder may begin, on purpose: its own gradient is not 0, and from the second step on outputs depend on the
        input. All that is asked of outputs is asked of those.
        """
        if self._awake is None:
            self._awake = []
            if any(p.dim() > 1 and p.requires_grad and not bool(p.any()) for p in self.model.parameters()):
                self._awake = self._first_step()
        with torch.no_grad():
            for p, value in self._awake:
                p.copy_(value)

    def _first_step(self) -> list[tuple[nn.Parameter, Tensor]]:
        """(parameter, its value after a small step) of those that are 0; none where outputs change in time already."""
        from tools.doctor.gradients import backward, wake

        try:
            with torch.no_grad():
                out, _ = self.forward(*self.features())
            if bool((out - out[:, :1]).abs().max() > 1e-6):
                return []
            with untouched(self.model), torch.enable_grad():
                zero = [p for p in self.model.parameters() if p.dim() > 1 and not bool(p.any())]
                self.model.train()
                backward(self)
                wake(self.model)
                # Labels that are in no target have one gradient: a little of each row's own parts them.
                return [(p, p.detach() + 0.1 * p.detach().std() * torch.randn_like(p)) for p in zero if bool(p.any())]
        except Exception:  # anybody's model: what does not run is told elsewhere
            return []

    def calibrate(self) -> None:
        """Sets running statistics to those of the probe's batch, by a pass with momentum 1."""
        modules = [m for m in self.model.modules() if getattr(m, "running_mean", None) is not None]
        momenta = [getattr(module, "momentum", None) for module in modules]
        for module in modules:
            if isinstance(getattr(module, "momentum", None), float):
                module.momentum = 1.0
        try:
            with torch.no_grad():
                self.forward(*self.features())
        finally:
            for module, momentum in zip(modules, momenta):
                if momentum is not None:
                    module.momentum = momentum
        broken = [b for name, b in self.model.named_buffers() if "running_" in name and not torch.isfinite(b).all()]
        for buffer in broken:  # restored afterwards by untouched
            buffer.fill_(1.0)

    def label_names(self, indices: list[int]) -> str:
        return " ".join(self.vocabulary[i] if i < len(self.vocabulary) else f"<{i}>" for i in indices)


class NoDropout(TorchFunctionMode):
    """Calls of torch.nn.functional's dropouts return their input; attention is asked for none."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if getattr(function, "__name__", "") in DROPOUTS:
            return kwargs.get("input", args[0] if args else None)
        if function is nn.functional.scaled_dot_product_attention:
            kwargs.pop("dropout_p", None)
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
        return function(*args, **kwargs)


def seed_all(seed: int) -> None:
    """Seeds every generator that a model may draw from; `untouched` puts their states back."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def in_full_precision(model: nn.Module, undo: list) -> None:
    """Puts float32 copies in place of parameters and buffers of half precision; adds the calls that undo it to `undo`.
    Buffers are put back by `untouched`."""
    for p in model.parameters():
        if p.dtype in HALF:
            undo.append(lambda p=p, data=p.data: setattr(p, "data", data))
            p.data = p.data.float()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.dtype in HALF:
                module._buffers[name] = buffer.float()


def own_dropouts(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """(module, attribute) of the rates of dropouts that are not torch's: any number whose name says so."""
    return [(module, name) for module in model.modules() for name, value in vars(module).items()
            if isinstance(value, float) and value > 0 and ("drop" in name.lower())
            and not isinstance(module, (nn.modules.dropout._DropoutNd, nn.RNNBase))]


def without_chance(model: nn.Module, own: bool = True) -> list:
    """Switches off dropout of every kind, spectrogram masks, added noise, dither and the draw of a streaming encoder
    among its contexts; returns the calls that undo it.

    `own` False leaves those dropouts on that are not torch's.
    """
    undo = []

    def put(module, name, value):
        before = getattr(module, name)
        undo.append(lambda: setattr(module, name, before))
        setattr(module, name, value)

    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            put(module, "p", 0.0)
        elif isinstance(module, nn.RNNBase) and module.dropout:
            put(module, "dropout", 0.0)
        if isinstance(vars(module).get("dither"), float):
            put(module, "dither", 0.0)
        if isinstance(vars(module).get("layer_drop_probs"), list):
            put(module, "layer_drop_probs", [0.0] * len(module.layer_drop_probs))
        # In training NeMo's streaming encoders draw one of several contexts.
        if len(vars(module).get("att_context_size_all") or ()) > 1 and hasattr(module, "att_context_probs"):
            put(module, "att_context_size_all", [module.att_context_size])
            put(module, "att_context_probs", [1.0])
    for module, name in own_dropouts(model) if own else ():
        put(module, name, 0.0)
    for name in ("spec_augmentation", "noise_and_rooms"):  # masks; rooms and noise of our models
        if (augmentation := model._modules.get(name)) is not None:
            undo.append(lambda name=name, module=augmentation: model._modules.__setitem__(name, module))
            model._modules[name] = None
    return undo


def made_up_sound(samples: int, rate: int, seed: int) -> np.ndarray:
    """Tones and noise that change every tenth of a second: no speech, but it varies as speech does."""
    generator = np.random.default_rng(seed)
    t = np.arange(samples) / rate
    step = max(rate // 10, 1)
    pitch = np.repeat(generator.uniform(90, rate * 0.2, samples // step + 1), step)[:samples]
    level = np.repeat(generator.uniform(0.02, 0.3, samples // step + 1), step)[:samples]
    return (level * np.sin(2 * np.pi * pitch * t) + 0.02 * generator.standard_normal(samples)).astype(np.float32)


def relative(change: Tensor, scale: Tensor) -> float:
    """Root mean square of `change` by that of `scale` about its mean."""
    spread = float((scale - scale.mean(dim=tuple(range(scale.dim() - 1)), keepdim=True)).square().mean().sqrt())
    return float(change.square().mean().sqrt()) / max(spread, 1e-12)
