"""Runs one training step of a live model without a trainer, and keeps what it computed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.doctor.frames import some_matrices

STILL = 1e-3  # change of outputs in time, by their spread over labels too, under which there is nothing to compare
LIKE = 0.5  # correlation of outputs in time, from which on they are of the same audio and the same modules
# Attributes of a model, for one step.
STOOD_IN_FOR = ("log", "log_dict", "manual_backward", "clip_gradients", "lr_schedulers", "_trainer", "_optimizer",
                "_train_dl", "forward")


class TrainingStep:
    """A training step that was run.

    Attributes:
        loss: what it returned, None where it does not run.
        calls: of each CTC loss computed in it, (log-probs, targets, input lengths, target lengths) and its value.
        aside: values of CTC losses that are other modules than `model.loss`: of inner layers with labels of their own,
            which no one else's targets can be held against.
        outputs: (log-probs (B', T, V+1), lengths (B')) of the one forward pass in it, None where there was another
            number of them.
        backward: whether it went backwards by itself (automatic_optimization=False): its gradients are there.
        ctc: the value of the first of `calls`, with its graph.
        plain: the same (B) of the batch by a forward pass of one's own, with targets (B, S) and their lengths (B).
    """

    def __init__(self):
        self.loss: Tensor | None = None
        self.calls: list[tuple[tuple, float]] = []
        self.aside: list[float] = []
        self.outputs: tuple[Tensor, Tensor] | None = None
        self.plain: tuple | None = None
        self.backward = False
        self.ctc: Tensor | None = None
        self.error = ""

    @property
    def given(self) -> tuple | None:
        """What the first loss was given: that of the last layer."""
        return self.calls[0][0] if self.calls else None

    def seen(self) -> tuple[tuple, float]:
        """((log-probs, targets, input lengths, target lengths) as they ought to be in the step, likeness).

        A step may train on the batch faster or slower, or on several views of it: then its own outputs are what the
        loss has to be of, with the batch's targets once a view. Where they belong to other audio, their likeness to
        those of the batch is about 0.
        """
        out, targets, frames, sizes = self.plain
        if self.outputs is None:
            own = self._by_itself()
            return (self.plain, 1.0) if own is None else ((own, targets, frames, sizes), 1.0)
        own, lengths = self.outputs
        views, rest = divmod(len(own), max(len(out), 1))
        if rest or not views or own.shape[2] != out.shape[2]:
            return self.plain, 1.0
        orders = [torch.arange(len(out)).repeat(views), torch.arange(len(out)).repeat_interleave(views)]
        alike = [likeness(own, lengths, out[rows.to(out.device)], frames[rows.to(out.device)]) for rows in orders]
        best = max(alike)
        rows = orders[alike.index(best)].to(out.device)
        return (own, targets[rows], lengths, sizes[rows]), best

    def _by_itself(self) -> Tensor | None:
        """Log-probs that a step has computed module by module, of the batch with noise or masks of its own: those that
        the loss was given, where they are log-probs and like the batch's."""
        out, _, frames, _ = self.plain
        own = self.given[0].float() if len(self.calls) == 1 else None
        if own is None or own.shape != out.shape or float(own.logsumexp(dim=-1).abs().max()) > 1e-2:
            return None
        return own if likeness(own, frames, out, frames) > LIKE else None


@dataclass
class Terms:
    """What a step's loss is made of.

    Attributes:
        weight: by what the CTC loss is multiplied in it.
        rest: what is left of its value without that.
        pull: size of the rest's gradient by that of CTC's, over some matrices.
        cosine: between the two.
    """

    weight: float
    rest: float
    pull: float
    cosine: float


def terms(step: TrainingStep, model) -> Terms | None:
    """The Terms of a step that has just been run, with gradients; None where its graph does not tell."""
    if step.ctc is None or len(step.calls) != 1 or step.backward or step.aside or not (
            step.loss.requires_grad and step.ctc.requires_grad):
        return None
    loss, ctc, matrices = step.loss.sum(), step.ctc.sum(), some_matrices(model)
    if abs(float(loss.detach()) - float(ctc.detach())) <= 0.01 * abs(float(ctc.detach())):
        return None  # it is CTC's, as it is
    try:
        inner = torch.autograd.grad(loss, step.ctc, retain_graph=True, allow_unused=True)[0]
        whole = torch.autograd.grad(loss, matrices, retain_graph=True, allow_unused=True)
        own = torch.autograd.grad(ctc, matrices, allow_unused=True)
    except RuntimeError:  # a graph that is gone, or of functions of one's own
        return None
    weight = 0.0 if inner is None else float(inner.mean())
    flat = [torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(matrices, part)])
            for part in (whole, own)]
    by_ctc = weight * flat[1]
    other = flat[0] - by_ctc
    size = float(by_ctc.norm())
    return Terms(weight, float(loss.detach()) - weight * float(ctc.detach()), float(other.norm()) / max(size, 1e-30),
                 float((other * by_ctc).sum()) / max(size * float(other.norm()), 1e-30))


def likeness(own: Tensor, lengths: Tensor, out: Tensor, frames: Tensor) -> float:
    """How much outputs (B, T, V+1) with lengths (B) are others stretched in time: the median of their correlations.

    0 where a length is less than half or more than twice what it was. Utterances whose output does not change in time
    say nothing, and of such alone it is 1.
    """
    if bool(((lengths > 2 * frames) | (2 * lengths < frames)).any()):
        return 0.0
    found = []
    for row in range(len(own)):
        one, two = own[row, : int(lengths[row])].float(), out[row, : int(frames[row])].float()
        if len(one) < 4 or len(two) < 4:
            continue
        two = F.interpolate(two.T[None], size=len(one), mode="linear", align_corners=False)[0].T
        level = float(two.std())
        one, two = one - one.mean(dim=0), two - two.mean(dim=0)
        if not float(two.square().mean().sqrt()) > STILL * level:
            continue
        found.append(float((one * two).sum() / (one.norm() * two.norm()).clamp(min=1e-12)))
    return sorted(found)[len(found) // 2] if found else 1.0


def run_training_step(probe, seed: int = 5) -> TrainingStep:
    """Runs `training_step` on a batch of the probe's, without a trainer; call it inside `ready(train=True)`."""
    model = probe.model
    step = TrainingStep()
    batch = training_batch(probe)
    audio, audio_lengths, targets, sizes, ids = batch
    torch.manual_seed(seed)
    with torch.no_grad():
        out = model.forward(input_signal=audio, input_signal_length=audio_lengths)
    step.plain = (out[0].detach().float(), targets, out[1].detach(), sizes)
    own_loss, own_forward = model.loss, model.forward
    passes: list[tuple[Tensor, Tensor]] = []

    def remember(module, args, kwargs, value):
        values = [*args, *kwargs.values()] if not kwargs else [
            kwargs.get(name, args[i] if i < len(args) else None)
            for i, name in enumerate(("log_probs", "targets", "input_lengths", "target_lengths"))]
        if len(values) >= 4 and all(isinstance(v, Tensor) for v in values[:4]) and isinstance(value, Tensor):
            step.calls.append((tuple(v.detach() for v in values[:4]), float(value.detach().sum())))
            step.ctc = value if step.ctc is None else step.ctc

    def forward(*args, **kwargs):
        result = own_forward(*args, **kwargs)
        if isinstance(result, (tuple, list)) and len(result) > 1 and all(isinstance(r, Tensor) for r in result[:2]):
            passes.append((result[0].detach().float(), result[1].detach()))
        return result

    handles = []
    if isinstance(own_loss, torch.nn.Module):
        handles = [own_loss.register_forward_hook(remember, with_kwargs=True)] + [
            module.register_forward_hook(lambda module, args, value: step.aside.append(float(value.detach().sum())))
            for module in model.modules()
            if type(module) is type(own_loss) and module is not own_loss
        ]
    try:
        with without_trainer(model, forward):
            torch.manual_seed(seed)
            result = model.training_step(batch if of_the_recipes(model) else batch[:4], 0)
        loss = result["loss"] if isinstance(result, dict) else result
        step.loss = loss if isinstance(loss, Tensor) else None
        step.error = "" if step.loss is not None else "it returns no loss"
        step.backward = any(p.grad is not None for p in model.parameters())
    except Exception as error:  # anybody's training step
        step.error = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        for p in model.parameters():
            p.grad = None
    finally:
        for handle in handles:
            handle.remove()
    step.outputs = passes[0] if len(passes) == 1 and passes[0][0].dim() == 3 else None
    return step


class _Anything:
    """Stands for a trainer or an optimizer in one training step: every attribute is there."""

    log_every_n_steps = 10**9
    param_groups = [{"lr": 0.0}]
    world_size = 1

    def __init__(self, step: int = 0):
        self.global_step = step

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()

    def __call__(self, *args, **kwargs):
        return None

    def __iter__(self):
        return iter(())

    def __bool__(self):
        return False


@contextlib.contextmanager
def without_trainer(model, forward) -> Iterator[None]:
    """Lets a step run, with this `forward`: a trainer of no consequence, logging that goes nowhere."""
    held = {name: vars(model)[name] for name in STOOD_IN_FOR if name in vars(model)}
    step = getattr(held.get("_trainer"), "global_step", 0)  # of a run that is asked in the middle
    object.__setattr__(model, "log", lambda *args, **kwargs: None)
    object.__setattr__(model, "log_dict", lambda *args, **kwargs: None)
    # Steps that optimize by hand: the gradients are theirs, the optimizer and its schedule are nobody's.
    object.__setattr__(model, "manual_backward", lambda loss, *args, **kwargs: loss.backward(*args, **kwargs))
    object.__setattr__(model, "clip_gradients", lambda *args, **kwargs: None)
    object.__setattr__(model, "lr_schedulers", lambda: _Anything())
    object.__setattr__(model, "_optimizer", _Anything())
    object.__setattr__(model, "_trainer", _Anything(step))
    object.__setattr__(model, "_train_dl", None)  # ours keeps count of the batches that were trained on
    object.__setattr__(model, "forward", forward)
    try:
        yield
    finally:
        for name in STOOD_IN_FOR:
            vars(model).pop(name, None)
            if name in held:
                object.__setattr__(model, name, held[name])


def of_the_recipes(model) -> bool:
    """Whether it is a model of this repository, whose batches have ids."""
    return "recipes.ctc_model" in {kind.__module__ for kind in type(model).__mro__}


def training_batch(probe, items: list | None = None):
    """(audio (B, samples), lengths, targets (B, S), lengths, ids) of `items`, or of four that the probe chooses.

    Targets are those of their texts as far as they fit, or made up.
    """
    from tools.doctor.labels import encode_text

    items = probe.items() if items is None else items
    audio, audio_lengths = probe.audio_batch(items)
    width = len(probe.vocabulary)
    targets = []
    for row, item in enumerate(items):
        try:
            target = encode_text(probe, item.text) if item.text else []
        except Exception:  # characters outside the labels: told elsewhere
            target = []
        targets.append([t for t in target if 0 <= t < width] or [(7 * row + 3 * i) % width for i in range(5)])
    # What would not fit is no matter of the loss.
    room = (audio_lengths * 100 // probe.sample_rate // 16).tolist()
    targets = [target[: max(int(r), 2)] for target, r in zip(targets, room)]
    sizes = torch.tensor([len(target) for target in targets])
    padded = torch.zeros(len(targets), int(sizes.max()), dtype=torch.long)
    for row, target in enumerate(targets):
        padded[row, : len(target)] = torch.tensor(target)
    ids = [f"probe-{row}" for row in range(len(items))]
    return audio, audio_lengths, padded.to(probe.device), sizes.to(probe.device), ids
