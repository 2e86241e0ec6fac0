"""Is the loss that training uses the CTC loss of these log-probabilities and targets?"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.doctor.finding import Finding
from tools.doctor.registry import NotExamined, check

TOLERANCE = 0.01  # relative
ALIKE = 0.3  # correlation of outputs in time above which they are of the same audio, be it faster, slower or masked
UNLIKE = 0.15  # and below which they have nothing to do with each other
STILL = 1e-3  # change of outputs in time, by their spread over labels too, under which there is nothing to compare
# Attributes of a model, for one step.
STOOD_IN_FOR = ("log", "log_dict", "_trainer", "_optimizer", "_train_dl", "forward")


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
    if step.loss is None:
        raise NotExamined(f"the training step does not run outside a trainer ({step.error})")
    if step.loss.numel() != 1:
        key = "ctc_reduction" if subject.settings is None else subject.settings.key("model.ctc_reduction")
        yield Finding(
            "loss-wrong", "prevents",
            f"A training step's loss is {step.loss.numel()} numbers (shape {tuple(step.loss.shape)}).",
            "Backward starts from one number: training ends at its first step with 'grad can be implicitly created "
            "only for scalar outputs'.", {"shape": list(step.loss.shape)},
            [f"{key}=mean_volume (nats a character), or mean_batch", "or loss.mean() at the end of training_step"], 1.0,
            where=key)
        return
    truth, alike = step.seen()
    out, targets, frames, sizes = truth
    feasible = reference(out, targets, frames, sizes, width - 1)
    if not bool(torch.isfinite(feasible).all()) or not bool(torch.isfinite(out).all()):
        raise NotExamined("outputs or losses of the probe's batch are not finite")
    expected = reductions(feasible, sizes)
    own = float(step.loss.detach())
    nearest = min(expected, key=lambda name: abs(expected[name] - own))
    near = abs(expected[nearest] - own) <= 2 * TOLERANCE * abs(expected[nearest])
    # Losses of inner layers are mixed into it: the whole then lies between them.
    values = [value for _, value in step.calls] + step.aside
    near = near or len(values) > 1 and min(values) * (1 - TOLERANCE) <= own <= max(values) * (1 + TOLERANCE)
    wrong = [] if step.given is None else _otherwise(step.given, truth)
    for inner, _ in step.calls[1:]:
        wrong += [name for name in _otherwise(inner, truth) if name in ("targets", "target lengths")]
        # A layer before some of the subsampling has more frames, each utterance by the same factor.
        within, last = inner[2].reshape(-1).cpu(), frames.cpu()
        factor = float(within.sum()) / max(float(last.sum()), 1.0)
        alone = within.shape != last.shape or bool(((within - factor * last).abs() > 2 * factor + 1).any())
        wrong += ["input lengths"] if alone else []
    if alike < ALIKE:
        wrong.append("audio")
    if near:
        # A fresh model's loss hardly tells right targets from wrong ones: what it was given does.
        wrong = [name for name in wrong if name != "log-probs"]
        if not wrong:
            return
    wrong = list(dict.fromkeys(wrong))
    # NeMo's loss on the right inputs, and then something on top: an auxiliary term or a scale that may be meant.
    on_top = bool(step.calls) and not wrong and own > 0 and 0.2 < own / max(expected[nearest], 1e-9) < 5
    unlike = wrong == ["audio"]
    given = [name for name in wrong if name != "audio"]
    yield Finding(
        "loss-wrong",
        "warning" if on_top or unlike and near and alike > UNLIKE else "prevents",
        f"A training step's loss is {own:.4g}; the CTC loss of the same outputs and targets is {expected[nearest]:.4g} "
        f"({nearest})." + (f" The loss is given other {', '.join(given)} than the batch and the model have."
                           if given else "")
        + (" The model's outputs in the step are not those of the batch's audio, nor of the same audio faster, slower "
           "or more than once." if "audio" in wrong else ""),
        "Between the batch and the number that is minimised something is changed: other audio, other targets, lengths "
        "of the input for those of the output, a scale, a term that swamps the rest.",
        {"own": own, **{f"CTC, {name}": value for name, value in expected.items()}, "given otherwise": wrong,
         **({"likeness of the outputs to those of the batch": round(alike, 3)} if "audio" in wrong else {}),
         **({"losses in the step": values} if len(values) > 1 else {})},
        ["training_step: loss = self.loss(log_probs=log_probs, targets=transcript, input_lengths=encoded_len, "
         "target_lengths=transcript_len)"],
        0.6 if on_top else 0.75 if unlike else 0.9,
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
    """A training step that was run.

    Attributes:
        loss: what it returned, None where it does not run.
        calls: of each CTC loss computed in it, (log-probs, targets, input lengths, target lengths) and its value.
        aside: values of CTC losses that are other modules than `model.loss`: of inner layers with labels of their own,
            which no one else's targets can be held against.
        outputs: (log-probs (B', T, V+1), lengths (B')) of the one forward pass in it, None where there was another
            number of them.
        plain: the same (B) of the batch by a forward pass of one's own, with targets (B, S) and their lengths (B).
    """

    def __init__(self):
        self.loss: Tensor | None = None
        self.calls: list[tuple[tuple, float]] = []
        self.aside: list[float] = []
        self.outputs: tuple[Tensor, Tensor] | None = None
        self.plain: tuple | None = None
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
            return self.plain, 1.0
        own, lengths = self.outputs
        views, rest = divmod(len(own), max(len(out), 1))
        if rest or not views or own.shape[2] != out.shape[2]:
            return self.plain, 1.0
        orders = [torch.arange(len(out)).repeat(views), torch.arange(len(out)).repeat_interleave(views)]
        alike = [likeness(own, lengths, out[rows.to(out.device)], frames[rows.to(out.device)]) for rows in orders]
        best = max(alike)
        rows = orders[alike.index(best)].to(out.device)
        return (own, targets[rows], lengths, sizes[rows]), best


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
    except Exception as error:  # anybody's training step
        step.error = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
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
