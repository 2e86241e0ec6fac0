"""Is the loss that training uses the CTC loss of these log-probabilities and targets?"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.doctor.finding import Finding
from tools.doctor.registry import NotExamined, check
from tools.doctor.training_step import Terms, TrainingStep, run_training_step, terms

TOLERANCE = 0.01  # relative
ALONG = 0.9  # cosine of gradients, from which on a loss is CTC's with something on top
ALIKE = 0.3  # correlation of outputs in time above which they are of the same audio, be it faster, slower or masked
UNLIKE = 0.15  # and below which they have nothing to do with each other


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
    with probe.ready(calibrate=False):
        log_probs, targets, input_lengths, target_lengths = planted(probe)
        try:
            with torch.no_grad():
                own = float(call_loss(probe.model, log_probs, targets, input_lengths, target_lengths))
                blank = loss_blank(probe)
            along = cosine(probe.model, log_probs, targets, input_lengths, target_lengths, width - 1)
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
        if along > ALONG and 0.2 < own / expected[nearest] < 5:
            yield _on_top(own, nearest, expected, along)
            return
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


def cosine(model, log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor, blank: int) -> float:
    """Between the gradients of the model's own loss and of torch's CTC for the scores before the softmax; NaN without one."""
    ways = []
    for own in (True, False):
        scores = log_probs.detach().clone().requires_grad_(True)
        out = scores.log_softmax(dim=-1)
        loss = call_loss(model, out, targets, input_lengths, target_lengths) if own else F.ctc_loss(
            out.transpose(0, 1), targets, input_lengths, target_lengths, blank=blank, reduction="sum")
        if not loss.requires_grad:
            return float("nan")
        ways.append(torch.autograd.grad(loss, scores)[0].flatten().double())
    return float(F.cosine_similarity(*ways, dim=0))


def _on_top(own: float, nearest: str, expected: dict[str, float], along: float) -> Finding:
    return Finding(
        "loss-wrong", "warning",
        f"On log-probabilities made up for it the loss is {own:.4g}; the CTC loss is {expected[nearest]:.4g} ({nearest}). Its "
        f"gradient is that of CTC for the most part (cosine {along:.3f}).",
        "Another term is added to the CTC loss, or utterances have weights. It may be meant: label smoothing is such a term.",
        {"own": own, "cosine of the gradients": round(along, 4),
         **{f"CTC, {name}": value for name, value in expected.items()}},
        ["where it is not meant: nemo.collections.asr.losses.ctc.CTCLoss(num_classes=len(labels), zero_infinity=True)"],
        0.7, where="loss")


def _likest_step(probe, tries: int = 3) -> tuple[TrainingStep, Terms | None]:
    """A training step and its terms: the first whose outputs are like those of the batch, else the likest of some.

    Masks, tempi and dropout are drawn anew in each, and may leave little of a fresh model's outputs in one.
    """
    likest = None
    with probe.ready(train=True):
        for seed in range(5, 5 + tries):
            step = run_training_step(probe, seed)
            if step.loss is None or step.loss.numel() != 1:
                return step, None
            alike = step.seen()[1]
            if likest is None or alike > likest[0]:
                likest = (alike, step, terms(step, probe.model))
            if alike >= ALIKE:
                break
    return likest[1:]


@check("loss", faults=("loss-wrong",), needs=("model",))
def training_step_uses_it(subject):
    """A training step's loss is the CTC loss of the model's outputs and the batch's targets."""
    probe = subject.probe
    width = len(probe.vocabulary) + 1
    if width < 4:
        raise NotExamined("the model names no labels")
    step, made_of = _likest_step(probe)
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
    shown = _reduction(step, width - 1) or nearest
    plus = made_of if not wrong and made_of is not None and abs(made_of.rest) > 2 * TOLERANCE * abs(own) else None
    given = [name for name in wrong if name != "audio"]
    yield Finding(
        "loss-wrong",
        "warning" if on_top or unlike and near and alike > UNLIKE else "prevents",
        f"A training step's loss is {own:.4g}; the CTC loss of the same outputs and targets is {expected[shown]:.4g} "
        f"({shown})." + ("" if plus is None else _told(plus)) + (f" The loss is given other {', '.join(given)} than the batch and the model have."
                           if given else "")
        + (" The model's outputs in the step are not those of the batch's audio, nor of the same audio faster, slower "
           "or more than once." if "audio" in wrong else ""),
        "Between the batch and the number that is minimised something is changed: other audio, other targets, lengths "
        "of the input for those of the output, a scale, a term that swamps the rest." if plus is None else
        "Another term is added to the CTC loss" + (", and it dominates: steps follow it more than CTC" if plus.pull > 1 else "")
        + ". It may be meant. An entropy or confidence term with the wrong sign drives the outputs to blanks; a teacher "
        "that is not trained teaches noise; a sum over frames outweighs a mean.",
        {"own": own, **{f"CTC, {name}": value for name, value in expected.items()}, "given otherwise": wrong,
         **({"likeness of the outputs to those of the batch": round(alike, 3)} if "audio" in wrong else {}),
         **({} if plus is None else {"weight of CTC in it": plus.weight, "the rest": plus.rest, "gradient of the rest by CTC's":
                                     plus.pull, "cosine of the two": plus.cosine}),
         **({"losses in the step": values} if len(values) > 1 else {})},
        ([] if plus is None else ["train with the CTC loss alone first; then add the other term with its weight from 0 up"])
        + ["training_step: loss = self.loss(log_probs=log_probs, targets=transcript, input_lengths=encoded_len, "
           "target_lengths=transcript_len)"],
        0.6 if on_top else 0.75 if unlike else 0.9,
        where="training_step",
    )


def _reduction(step, blank: int) -> str | None:
    """The reduction of the model's own loss, by what it made of what it was given; None where none fits."""
    if not step.calls:
        return None
    given, value = step.calls[0]
    try:
        made = reductions(reference(*given, blank), given[3])
    except (RuntimeError, IndexError):  # given in a form of its own
        return None
    # torch's own mean last: of utterances of one length it is the same as NeMo's.
    return next((name for name in ("mean_batch", "mean_volume", "sum", "mean")
                 if abs(made[name] - value) <= 2 * TOLERANCE * abs(made[name])), None)


def _told(plus: Terms) -> str:
    return (f" CTC goes into it with a weight of {plus.weight:.3g}, and another term adds {plus.rest:.3g}; the other term's gradient is "
            f"{plus.pull:.2g} times CTC's.")


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
