"""Is the loss that training uses the CTC loss of these log-probabilities and targets?"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.doctor.finding import Finding
from tools.doctor.registry import NotExamined, check

TOLERANCE = 0.01  # relative
STOOD_IN_FOR = ("log", "log_dict", "_trainer", "_optimizer", "_train_dl")  # attributes of a model, for one step


def call_loss(model, log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor) -> Tensor:
    """The model's own loss of (B, T, V+1), (B, S), (B), (B): by name as NeMo calls it, else by position."""
    try:
        loss = model.loss(
            log_probs=log_probs, targets=targets, input_lengths=input_lengths, target_lengths=target_lengths
        )
    except TypeError:
        loss = model.loss(log_probs, targets, input_lengths, target_lengths)
    return loss if loss.dim() == 0 else loss.sum()


def reference(log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor, blank: int) -> Tensor:
    """CTC losses (B) in nats by torch in float64."""
    return F.ctc_loss(
        log_probs.detach().double().cpu().transpose(0, 1), targets.cpu().long(), input_lengths.cpu().long(),
        target_lengths.cpu().long(), blank=blank, reduction="none",
    )


def reductions(losses: Tensor, target_lengths: Tensor) -> dict[str, float]:
    """What a scalar made from the losses of a batch can be."""
    size = target_lengths.cpu().double().clamp(min=1)
    return {
        "mean_batch": float(losses.mean()),
        "mean_volume": float(losses.sum() / size.sum()),
        "mean": float((losses / size).mean()),
        "sum": float(losses.sum()),
    }


def planted(probe, seed: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random log-probabilities (4, 40, V+1) and targets of different lengths that fit, both lengths with them."""
    generator = torch.Generator().manual_seed(seed)
    width = len(probe.vocabulary) + 1
    log_probs = (2 * torch.randn(4, 40, width, generator=generator)).log_softmax(dim=-1)
    target_lengths = torch.tensor([9, 4, 12, 6])
    input_lengths = torch.tensor([40, 31, 36, 25])
    low = 0 if width < 3 else 1
    targets = torch.randint(low, max(width - 1, low + 1), (4, 12), generator=generator)
    device = probe.device
    return log_probs.to(device), targets.to(device), input_lengths.to(device), target_lengths.to(device)


def loss_blank(probe) -> int | None:
    """The index that the loss treats as blank; None where it cannot be told.

    Of frames k, t, k for the target t the loss is near 0 for the blank k alone.
    """
    width = len(probe.vocabulary) + 1
    order = [width - 1, 0, *range(1, width - 1)]
    best: list[tuple[float, int]] = []
    for k in order:
        t = 1 if k != 1 else 2
        if t >= width:
            return None
        log_probs = torch.full((1, 3, width), -30.0, device=probe.device)
        for frame, index in enumerate((k, t, k)):
            log_probs[0, frame, index] = 0.0
        sizes = torch.ones(1, dtype=torch.long, device=probe.device)
        value = float(call_loss(probe.model, log_probs.log_softmax(-1), sizes[:, None] * t, sizes * 3, sizes))
        if value < 1.0 and value == value:
            best.append((value, k))
            if k == width - 1:
                break
    return min(best)[1] if best else None


@check("loss", faults=("loss-wrong", "blank-index"), needs=("model",))
def loss_is_ctc(subject):
    """The loss is the CTC loss, with the blank after the labels."""
    probe = subject.probe
    width = len(probe.vocabulary) + 1
    if width < 4:
        raise NotExamined("the model names no labels")
    with probe.ready(calibrate=False), torch.no_grad():
        log_probs, targets, input_lengths, target_lengths = planted(probe)
        try:
            own = float(call_loss(probe.model, log_probs, targets, input_lengths, target_lengths))
            blank = loss_blank(probe)
        except Exception as error:
            raise NotExamined(f"the loss does not take NeMo's arguments ({type(error).__name__}: {error})") from None
    if blank is not None and blank != width - 1:
        name = probe.label_names([blank])
        yield Finding(
            "blank-index",
            "prevents",
            f"The loss takes output {blank} ({name!r}) for the blank, the model's blank is {width - 1}, after its "
            f"{width - 1} labels.",
            "Training puts the blank's frames on a letter, and decoding prints that letter everywhere (or drops it).",
            {"blank of the loss": blank, "blank of the model": width - 1},
            [f"build the loss with num_classes={width - 1} (NeMo's CTCLoss puts the blank there)"],
            0.97,
            where="loss",
        )
        return
    losses = reference(log_probs, targets, input_lengths, target_lengths, width - 1)
    expected = reductions(losses, target_lengths)
    nearest = min(expected, key=lambda name: abs(expected[name] - own))
    if abs(expected[nearest] - own) > TOLERANCE * abs(expected[nearest]):
        yield Finding(
            "loss-wrong",
            "prevents",
            f"On log-probabilities made up for it the loss is {own:.4g}; the CTC loss is {expected[nearest]:.4g} "
            f"({nearest}).",
            "The loss is not that of CTC with these lengths and targets: lengths swapped or ignored, targets shifted, "
            "axes not transposed, a sign or a scale.",
            {"own": own, **{f"CTC, {name}": value for name, value in expected.items()}},
            ["use nemo.collections.asr.losses.ctc.CTCLoss(num_classes=len(labels), zero_infinity=True) as it is"],
            0.95,
            where="loss",
        )



@check("loss", faults=("loss-wrong",), needs=("model",))
def training_step_uses_it(subject):
    """A training step's loss is the CTC loss of the model's outputs and the batch's targets."""
    probe = subject.probe
    width = len(probe.vocabulary) + 1
    if width < 4:
        raise NotExamined("the model names no labels")
    with probe.ready(train=True):
        step = run_training_step(probe)
        out, targets, frames, sizes = step.truth
        if step.loss is None:
            raise NotExamined(f"the training step does not run outside a trainer ({step.error})")
        feasible = reference(out, targets, frames, sizes, width - 1)
    if not bool(torch.isfinite(feasible).all()) or not bool(torch.isfinite(out).all()):
        raise NotExamined("outputs or losses of the probe's batch are not finite")
    expected = reductions(feasible, sizes)
    own = float(step.loss.detach())
    nearest = min(expected, key=lambda name: abs(expected[name] - own))
    given = step.given
    wrong = [] if given is None else _otherwise(given, (out, targets, frames, sizes))
    if step.extra or abs(expected[nearest] - own) <= 2 * TOLERANCE * abs(expected[nearest]):
        # A fresh model's loss hardly tells right targets from wrong ones: what it was given does.
        wrong = [name for name in wrong if name != "log-probs"]
        if not wrong or step.extra:
            return
    # NeMo's loss on the right inputs, and then something on top: an auxiliary term or a scale that may be meant.
    on_top = given is not None and not wrong and own > 0 and 0.2 < own / max(expected[nearest], 1e-9) < 5
    yield Finding(
        "loss-wrong",
        "warning" if on_top else "prevents",
        f"A training step's loss is {own:.4g}; the CTC loss of the same outputs and targets is {expected[nearest]:.4g} "
        f"({nearest})" + (f". The loss is given other {', '.join(wrong)} than the batch and the model have." if wrong
                          else "."),
        "Between the outputs and the number that is minimised something is changed: other targets, lengths of the "
        "input "
        "for those of the output, a scale, a term that swamps the rest.",
        {"own": own, **{f"CTC, {name}": value for name, value in expected.items()}, "given otherwise": wrong},
        ["training_step: loss = self.loss(log_probs=log_probs, targets=transcript, input_lengths=encoded_len, "
         "target_lengths=transcript_len)"],
        0.6 if on_top else 0.9,
        where="training_step",
    )


def _otherwise(given, truth) -> list[str]:
    """Which of log-probs, targets, input lengths, target lengths are not the true ones; padding does not count."""
    (out, targets, frames, sizes), (true_out, true_targets, true_frames, true_sizes) = given, truth

    def same(a: Tensor, b: Tensor) -> bool:
        return a.shape == b.shape and float((a.double().cpu() - b.double().cpu()).abs().max()) <= 1e-3

    wrong = [] if same(out, true_out) else ["log-probs"]
    rows = list(zip(true_targets.tolist(), true_sizes.tolist()))
    if targets.dim() == 1:  # all in one row, without padding
        right = targets.tolist() == [t for row, size in rows for t in row[:size]]
    else:
        right = len(targets) == len(rows) and all(
            seen[:size] == row[:size] for seen, (row, size) in zip(targets.tolist(), rows))
    wrong += [] if right else ["targets"]
    wrong += [] if same(frames.reshape(-1), true_frames) else ["input lengths"]
    return wrong + ([] if same(sizes.reshape(-1), true_sizes) else ["target lengths"])


class TrainingStep:
    """A training step that was run: its loss, what the loss was given, and what it ought to have been given."""

    def __init__(self):
        self.loss: Tensor | None = None
        self.given: tuple | None = None
        self.truth: tuple | None = None
        self.error = ""
        self.extra = False


def run_training_step(probe) -> TrainingStep:
    """Runs `training_step` on a batch of the probe's, without a trainer; call it inside `ready(train=True)`."""
    model = probe.model
    step = TrainingStep()
    batch = training_batch(probe)
    audio, audio_lengths, targets, sizes, ids = batch
    torch.manual_seed(5)
    with torch.no_grad():
        out = model.forward(input_signal=audio, input_signal_length=audio_lengths)
    step.truth = (out[0].detach().float(), targets, out[1].detach(), sizes)
    step.extra = bool(getattr(model, "is_interctc_enabled", lambda: False)())
    own_loss = model.loss

    def remember(module, args, kwargs):
        values = [*args, *kwargs.values()] if not kwargs else [
            kwargs.get(name, args[i] if i < len(args) else None)
            for i, name in enumerate(("log_probs", "targets", "input_lengths", "target_lengths"))]
        if step.given is None and len(values) >= 4 and all(isinstance(v, Tensor) for v in values[:4]):
            step.given = tuple(value.detach() for value in values[:4])

    handle = None
    if isinstance(own_loss, torch.nn.Module):
        handle = own_loss.register_forward_pre_hook(remember, with_kwargs=True)
    held = {name: vars(model)[name] for name in STOOD_IN_FOR if name in vars(model)}
    try:
        stand_in_for_trainer(model)
        torch.manual_seed(5)
        takes_ids = "recipes.ctc_model" in {kind.__module__ for kind in type(model).__mro__}
        result = model.training_step(batch if takes_ids else batch[:4], 0)
        loss = result["loss"] if isinstance(result, dict) else result
        step.loss = loss if isinstance(loss, Tensor) else None
        step.error = "" if step.loss is not None else "it returns no loss"
    except Exception as error:  # anybody's training step
        step.error = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
    finally:
        if handle is not None:
            handle.remove()
        for name in STOOD_IN_FOR:
            vars(model).pop(name, None)
            if name in held:
                object.__setattr__(model, name, held[name])
    return step


class _Anything:
    """Stands for a trainer or an optimizer in one training step: every attribute is there."""

    global_step = 0
    log_every_n_steps = 10**9
    param_groups = [{"lr": 0.0}]
    world_size = 1

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


def stand_in_for_trainer(model) -> None:
    """Lets `training_step` run: a trainer of no consequence, logging that goes nowhere."""
    object.__setattr__(model, "log", lambda *args, **kwargs: None)
    object.__setattr__(model, "log_dict", lambda *args, **kwargs: None)
    object.__setattr__(model, "_optimizer", _Anything())
    object.__setattr__(model, "_trainer", _Anything())
    object.__setattr__(model, "_train_dl", None)  # ours keeps count of the batches that were trained on


def training_batch(probe):
    """(audio (B, samples), lengths, targets (B, S), lengths, ids) of four items; targets of their texts, or made up."""
    from tools.doctor.labels import encode_text

    items = probe.items()
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
