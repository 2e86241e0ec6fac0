"""What must not matter: padding, the other items of a batch, and (chance aside) train or eval mode."""

from __future__ import annotations

import torch
from torch import Tensor

from tools.doctor.finding import Finding, Plot
from tools.doctor.probe import own_dropouts, relative, seed_all
from tools.doctor.registry import NotExamined, check
from tools.doctor.tracing import describe, first_difference, shortened, trace

NEGLIGIBLE = 2e-3  # relative change that rounding may make
EDGE = 0.25  # share of frames, at the end, that an unmasked convolution may reach
LONG, BEHIND = 1200, 120  # feature frames of speech and of padding behind it, to compare what is heard of either


def _finite(*tensors: Tensor) -> None:
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise NotExamined("outputs are not finite")


@check("invariance", faults=("padding-leak", "norm-padding"), needs=("model",))
def padding_changes_nothing(subject):
    """Padding behind an utterance does not change its output."""
    probe = subject.probe
    probe.must_repeat()
    with probe.ready(), torch.no_grad():
        x, lengths = probe.features()
        item = int(lengths.argmin())
        size = int(lengths[item])
        alone, length = x[item : item + 1, :, :size], lengths[item : item + 1]
        padded = torch.nn.functional.pad(alone, (0, size))
        runs = {name: (lambda features=features: probe.forward(features, length))
                for name, features in (("alone", alone), ("padded", padded))}
        (out, kept), (out_padded, _) = runs["alone"](), runs["padded"]()
        _finite(out)
        valid = min(out.shape[1], out_padded.shape[1], max(int(kept[0]), 1))
        out, out_padded = out[0, :valid], out_padded[0, :valid]
        change = relative(out_padded - out, out)
        if not change > NEGLIGIBLE:
            return
        found = first_difference(trace(probe.model, runs["alone"]), trace(probe.model, runs["padded"]), 1e-3)
        heard = _heard_from_afar(probe) if change > 0.2 else None
    spread = (out - out.mean(dim=0)).square().mean().sqrt().clamp(min=1e-9)
    per_frame = (out_padded - out).square().mean(dim=1).sqrt() / spread
    touched = torch.nonzero(per_frame > max(NEGLIGIBLE, 0.02 * float(per_frame.max()))).flatten()
    first = int(touched[0]) if len(touched) else 0
    reach = (valid - first) / valid
    at_edge = reach <= EDGE
    by_norm = found is not None and _is_norm(*found)
    name = describe(found[0]) if found else "code between modules"
    if found and found[2]:
        name = f"before {name}"
    plot = Plot("Change by padding as long as the utterance", "output frame", "change / spread of the outputs",
                {"change": (list(range(valid)), per_frame.tolist())}, "0 everywhere is right")
    evidence = {"relative change": change, "frames changed": f"{len(touched)} of {valid}, from frame {first} on",
                "largest change of a frame": float(per_frame.max()), "first": name}
    if heard is not None and heard[0] > 0.1 and heard[0] > 20 * heard[1]:
        yield _inverted(heard, evidence, found[0].name if found else "encoder", plot)
        return
    if by_norm:
        yield Finding(
            "norm-padding",
            "warning",
            f"A normalisation counts padding: an utterance with padding as long as itself has outputs that differ by "
            f"{change:.0%} of their spread, in all of its frames.",
            "Mean and variance over time are taken over the padding too. The same speech then looks different in every "
            "batch, and in evaluation other than in training.",
            evidence,
            ["take the statistics over the valid frames: multiply by the mask, and divide by the lengths",
             "or normalise each frame over its features (LayerNorm)"],
            0.9,
            where=found[0].name,
            plots=[plot],
        )
        return
    recurrent = found is not None and found[0].kind in ("LSTM", "GRU", "RNN")
    yield Finding(
        "padding-leak",
        "warning",
        f"Padding changes the output of the speech before it by {change:.1%} of its spread"
        + (f", in the last {valid - first} of {valid} frames only." if at_edge else f", in {len(touched)} of {valid} "
                                                                                    "frames."),
        "A convolution without a mask reads what earlier layers left on the padding: the end of an utterance depends "
        "on "
        "how much padding stands behind it. Models train with it; results vary a little with the batch." if at_edge else
        "The recurrence runs over the padding, backwards from its end, before it meets the speech." if recurrent else
        "Padding takes part in what every frame sees: attention without a mask (or with one over keys and a softmax "
        "over queries), pooling or recurrence over all frames.",
        evidence,
        ["set padding to 0 before every convolution (model.encoder.conv_mask=true in NeMo's ConvASREncoder)"] if at_edge
        else ["pack the sequences (torch.nn.utils.rnn.pack_padded_sequence), or reverse each within its length"]
        if recurrent else ["mask padding in attention (key_padding_mask) and before each layer that looks along time",
                           "attention of one's own: (q @ k.transpose(-1, -2)).masked_fill(padding, -inf).softmax(-1), "
                           "over the keys; a softmax over the queries (-2) undoes the mask"],
        (0.35 if change < 0.1 else 0.45) if at_edge else 0.55 if change < 0.2 else 0.65,
        where=found[0].name if found else "encoder",
        plots=[plot],
    )


def _heard_from_afar(probe) -> tuple[float, float] | None:
    """How much the first half of a long utterance moves, in its spread: when padding comes behind its end, and when,
    with the padding there, other speech stands near its end (the last frames reach the padding by themselves, through
    strided convolutions). None where an output is not finite."""
    x, lengths = probe.made_up_features([LONG])
    other, _ = probe.made_up_features([LONG], seed=13)
    changed = x.clone()
    changed[:, :, -3 * BEHIND : -2 * BEHIND] = other[:, :, -3 * BEHIND : -2 * BEHIND]
    alone, padded, elsewhere = (probe.forward(torch.nn.functional.pad(features, (0, behind)), lengths)[0]
                                for features, behind in ((x, 0), (x, BEHIND), (changed, BEHIND)))
    half = alone.shape[1] // 2
    alone, padded, elsewhere = alone[0, :half], padded[0, :half], elsewhere[0, :half]
    if half < 8 or not bool(torch.isfinite(torch.stack([alone, padded, elsewhere])).all()):
        return None
    return relative(padded - alone, padded), relative(elsewhere - padded, padded)


def _inverted(heard: tuple[float, float], evidence: dict, where: str, plot: Plot) -> Finding:
    return Finding(
        "padding-leak",
        "prevents",
        f"Frames hear the padding and not each other: {BEHIND} frames of padding behind an utterance of {LONG} move "
        f"its first half by {heard[0]:.0%} of the outputs' spread, other speech near its end by {heard[1]:.1%}.",
        "The padding mask is inverted: one side makes it True on real frames, the other takes True for padding. What "
        "looks along time looks at padding only, and each frame of speech is transcribed alone. Without padding the "
        "mask leaves nothing, so that evaluation one by one differs from training in batches.",
        {"moved by padding": heard[0], "moved by other speech": heard[1], **evidence},
        ["invert the mask where it is made, once: padding = ~(torch.arange(T) < lengths[:, None])",
         "conventions: True is padding in key_padding_mask of torch.nn.MultiheadAttention; True is what may be looked "
         "at in torch.nn.functional.scaled_dot_product_attention(attn_mask=...)"],
        0.95,
        where=where,
        plots=[plot],
    )


def _is_norm(a, b, inside: bool) -> bool:
    """Whether what differs first is a normalisation: a module of that name, or the same affine change of all frames."""
    if not inside:
        return "norm" in a.kind.lower()
    if a.entered is None or b.entered is None or (pair := shortened(a.entered, b.entered)) is None:
        return False
    one, two = (tensor.double().squeeze() for tensor in pair)
    sizes = zip(a.entered.squeeze().shape, b.entered.squeeze().shape)
    axis = next((i for i, (p, q) in enumerate(sizes) if p != q), None)
    if axis is None or one.dim() != 2 or one.shape[axis] < 8:
        return False
    one, two = (one, two) if axis == 1 else (one.T, two.T)  # (D, T)
    centred, other = (t - t.mean(dim=1, keepdim=True) for t in (one, two))
    slope = (centred * other).sum(dim=1) / centred.square().sum(dim=1).clamp(min=1e-12)
    rest = (other - slope[:, None] * centred).square().sum() / other.square().sum().clamp(min=1e-12)
    return float(rest) < 1e-4


@check("invariance", faults=("batch-leak",), needs=("model",))
def items_are_independent(subject):
    """The other items of a batch do not change an item's output."""
    probe = subject.probe
    probe.must_repeat()
    with probe.ready(), torch.no_grad():
        x, lengths = probe.features()
        size = int(lengths.min())
        same = torch.full((3,), size, device=x.device)
        batch = x[:3, :, :size]
        strange = x[3:4, :, :size] * 0.7 - batch[1:2] * 0.5
        worst = (0.0, 0, None)
        # A recurrence over the batch hands on to later items only, so each end is changed and the other one watched.
        for kept, other in ((0, torch.cat([batch[:1], strange, strange.flip(1)])),
                            (2, torch.cat([strange, strange.flip(1), batch[2:]]))):
            runs = [lambda b=b: probe.forward(b, same) for b in (batch, other)]
            out, changed = (run()[0][kept] for run in runs)
            _finite(out, changed)
            worst = max(worst, (relative(out - changed, out), kept, runs), key=lambda entry: entry[0])
        change, kept, runs = worst
        if not change > NEGLIGIBLE:
            return
        found = first_difference(trace(probe.model, runs[0]), trace(probe.model, runs[1]), 1e-3, _item(3, kept))
    name = describe(found[0]) if found else "code between modules"
    yield Finding(
        "batch-leak",
        "prevents",
        f"With other utterances beside it, the same utterance gets outputs that differ by {change:.0%} of their "
        "spread, in "
        "eval mode too.",
        "A layer mixes along the batch axis: a recurrence that takes (B, T, D) for (T, B, D), a reshape or softmax "
        "over "
        "the wrong axis, batch statistics in evaluation. What is learned hangs on who shares a batch.",
        {"relative change": change, "item watched": kept, "first": ("before " if found and found[2] else "") + name},
        ["nn.GRU(..., batch_first=True), or transpose to (T, B, D) before it and back after it"],
        0.97,
        where=found[0].name if found else "encoder",
    )


@check("invariance", faults=("batch-leak",), needs=("model",))
def company_changes_nothing(subject):
    """An utterance among others of other lengths has the outputs that it has with the same padding alone."""
    probe = subject.probe
    probe.must_repeat()
    with probe.ready(), torch.no_grad():
        x, lengths = probe.features()
        together, kept = probe.forward(x, lengths)
        _finite(together)
        changes, returned = [], []
        for item in range(len(x)):
            out, size = probe.forward(x[item : item + 1], lengths[item : item + 1])
            valid = min(out.shape[1], together.shape[1], int(size[0]))
            # By the spread over labels too: outputs that are the same in all frames have next to none over time.
            scale = max(float(out[0, :valid].std()), 1e-6) if valid > 1 else 1.0
            moved = float((out[0, :valid] - together[item, :valid]).square().mean().sqrt()) if valid > 1 else 0.0
            changes.append(min(relative(out[0, :valid] - together[item, :valid], out[0, :valid]), 5 * moved / scale)
                           if valid > 1 else 0.0)
            returned.append(int(size[0]))
    if max(changes) <= 0.2 and returned == kept.tolist():
        return
    worst = max(range(len(changes)), key=changes.__getitem__)
    yield Finding(
        "batch-leak",
        "prevents",
        f"In a batch of items of {lengths.tolist()} frames, item {worst} has outputs that differ by "
        f"{changes[worst]:.0%} of their spread from those that it has alone, with the same padding."
        if max(changes) > 0.2 else f"In a batch the lengths returned are {kept.tolist()}, item by item {returned}.",
        "Items meet the lengths or masks of other items: lengths were sorted and the batch was not (for "
        "pack_padded_sequence), or put back in the wrong order.",
        {"relative change of each item": [round(change, 4) for change in changes],
         "lengths in the batch": kept.tolist(), "lengths alone": returned},
        ["pack_padded_sequence(x, lengths, enforce_sorted=False), which sorts and restores both",
         "or sort x and lengths by one order, and undo it on the outputs"],
        0.93,
        where="encoder",
    )


def _item(batch: int, item: int):
    """Takes one item of a tensor where its batch axis can be told."""

    def take(tensor: Tensor):
        if tensor.dim() < 2 or tensor.shape[0] != batch:
            return None
        return tensor[item]

    return take


@check("invariance", faults=("train-eval-differ",), needs=("model",))
def modes_agree(subject):
    """Without chance, train and eval mode give the same outputs."""
    probe = subject.probe
    probe.must_repeat()
    with probe.ready(), torch.no_grad():
        x, lengths = probe.features()
        x, lengths = x[:2, :, : int(lengths[:2].max())], lengths[:2]
        _statistics_of(probe, x, lengths)
        evaluated, eval_lengths = probe.forward(x, lengths)
        _finite(evaluated)
        steps = trace(probe.model, lambda: probe.forward(x, lengths))
        probe.model.train()
        trained, train_lengths = probe.forward(x, lengths)
        by_chance = _by_chance(probe, x, lengths, trained)
        if by_chance:  # chance of one's own making: what is left of the difference on average?
            trained = _mean(probe, x, lengths)
        train_steps = trace(probe.model, lambda: probe.forward(x, lengths))
        if not bool(torch.isfinite(trained).all()):
            raise NotExamined("outputs in train mode are not finite")
        change = _mode_change(evaluated, trained, eval_lengths, train_lengths)
    if not by_chance and change <= 0.1 and own_dropouts(probe.model) and subject.seconds_left() > 20:
        with probe.ready(own_dropout=True), torch.no_grad():
            _statistics_of(probe, x, lengths)
            evaluated, eval_lengths = probe.forward(x, lengths)
            probe.model.train()
            by_chance = True
            change = _mode_change(evaluated, _mean(probe, x, lengths), eval_lengths, train_lengths)
    if change > (0.5 if by_chance else 0.1):
        found = first_difference(steps, train_steps, 0.05)
        name = ("before " if found and found[2] else "") + describe(found[0]) if found else "code between modules"
        yield Finding(
            "train-eval-differ",
            "prevents" if change > 0.5 and not by_chance else "warning",
            "With dropout and masks off, and running statistics set to those of the batch, outputs in train and eval "
            "mode "
            f"differ by {change:.0%} of their spread."
            + (" (On average over draws of a dropout that could not be switched off.)" if by_chance else ""),
            "Something else than dropout depends on the mode: a scale or a branch under `if self.training`, statistics "
            "that are kept wrongly, dropout of one's own. What is learned is not what is used.",
            {"relative change": change, "first": name, "chance that could not be switched off": by_chance},
            ["print model.training-dependent code: only dropout, batch statistics and augmentation may differ",
             "dropout of one's own: divide by (1 - p) in training"],
            0.6 if by_chance else 0.9,
            where=found[0].name if found else "encoder",
        )


def with_statistics(model) -> list:
    """(name, module) of those that keep running statistics."""
    return [(name, m) for name, m in model.named_modules() if isinstance(getattr(m, "running_mean", None), Tensor)]


def _statistics_of(probe, x, lengths) -> None:
    """Sets running statistics to those of this batch, and leaves the model in eval mode; undone by `untouched`.

    torch's running variance is that over n - 1, its batch's over n: through many layers that little grows, and is taken
    out here.
    """
    handles = []

    def as_in_batch(module, args, output):
        if module.training and module.running_var is not None and args[0].numel() > args[0].shape[1]:
            count = args[0].numel() / args[0].shape[1]
            module.running_var.mul_((count - 1) / count)

    for _, module in with_statistics(probe.model):
        if isinstance(getattr(module, "momentum", None), float):
            module.momentum = 1.0
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            handles.append(module.register_forward_hook(as_in_batch))
    try:
        probe.model.train()
        probe.forward(x, lengths)
    finally:
        for handle in handles:
            handle.remove()
    probe.model.eval()


def _by_chance(probe, x, lengths, trained: Tensor) -> bool:
    seed_all(1)
    again, _ = probe.forward(x, lengths)
    return trained.shape == again.shape and relative(again - trained, trained) > 0.02


def _mean(probe, x, lengths, draws: int = 10) -> Tensor:
    return torch.stack([probe.forward(x, lengths)[0] for _ in range(draws)]).mean(dim=0)


def _mode_change(evaluated, trained, eval_lengths, train_lengths) -> float:
    if trained.shape != evaluated.shape or not torch.equal(eval_lengths, train_lengths):
        return 1.0
    valid = torch.arange(trained.shape[1], device=trained.device)[None] < eval_lengths[:, None]
    return relative((trained - evaluated)[valid], evaluated[valid])


@check("invariance", faults=("train-eval-differ",), needs=("model",))
def running_statistics_follow(subject):
    """Running statistics follow those of the batches."""
    probe = subject.probe
    # Those without a momentum average over all batches: the first moves them all the way, as it should.
    named = [(name, m) for name, m in with_statistics(probe.model) if isinstance(getattr(m, "momentum", None), float)]
    if not named:
        return
    # One batch takes old statistics to (1 - m) old + m new: two starts that are 10 apart end 10 (1 - m) apart.
    ends, called = [], set()
    handles = [m.register_forward_hook(lambda m, args, output, name=name: called.add(name)) for name, m in named]
    for offset in (0.0, 10.0):
        with probe.ready(train=True), torch.no_grad():
            for _, module in named:
                module.running_mean.add_(offset)
            probe.forward(*probe.features())
            ends.append({name: m.running_mean.clone() for name, m in named})
    for handle in handles:
        handle.remove()
    named = [(name, m) for name, m in named if name in called]  # those that nothing calls are another matter
    moved = {name: 1 - float((ends[1][name] - ends[0][name]).median()) / 10 for name, _ in named
             if bool(torch.isfinite(ends[0][name]).all()) and float(ends[0][name].abs().max()) < 1e4}
    stuck = [name for name, share in moved.items() if share < 0.002]
    hasty = [name for name, share in moved.items() if share > 0.75]
    if not stuck and not hasty:
        return
    some = stuck or hasty
    yield Finding(
        "train-eval-differ",
        "prevents" if len(stuck) > len(named) // 2 else "warning",
        f"{len(some)} of {len(named)} normalisations keep running statistics that "
        + ("never follow the batches" if stuck else "are those of the last batch alone") + f": {', '.join(some[:3])}.",
        "Evaluation normalises by the running statistics, training by the batch's. "
        + ("With a momentum near 0 (or a frozen update) they stay those of initialisation." if stuck else
           "With a momentum near 1 they change with every batch."),
        {"share of the way one batch goes": {name: round(moved[name], 4) for name in some[:5]}},
        ["momentum=0.1 for torch's BatchNorm (its momentum is the share of the new batch, not of the old value)"],
        0.9,
        where=some[0],
    )


@check("invariance", faults=("norm-padding",), needs=("model",))
def batch_statistics_leave_padding_out(subject):
    """Batch statistics in training are those of speech, not of padding."""
    probe = subject.probe
    named = with_statistics(probe.model)
    if not named:
        return
    found = []
    with probe.ready(train=True), torch.no_grad():
        for module in dict(named).values():
            if isinstance(getattr(module, "momentum", None), float):
                module.momentum = 1.0
        x, lengths = probe.features()
        size = int(lengths.min())
        same = torch.full((2,), size, device=x.device)
        for features in (x[:2, :, :size], torch.nn.functional.pad(x[:2, :, :size], (0, size))):
            probe.forward(features, same)
            found.append({name: (m.running_mean.clone(), m.running_var.clone()) for name, m in named})
    name = named[0][0]
    change = {}
    for name, _ in named:
        mean, variance = found[0][name]
        change[name] = float(((found[1][name][0] - mean).abs() / variance.clamp(min=1e-8).sqrt()).mean()
                             + (found[1][name][1] / variance.clamp(min=1e-8) - 1).abs().mean())
    # Convolutions that were not masked make some difference of their own; the first layers' is the padding's.
    worst = max(change, key=change.get)
    if not change[worst] > 0.1:
        return
    yield Finding(
        "norm-padding",
        "warning" if change[worst] > 0.2 else "note",
        f"Batch normalisation counts padding in training: with padding as long as the speech, the statistics of "
        f"{sum(c > 0.1 for c in change.values())} of {len(change)} layers change.",
        "torch's BatchNorm takes mean and variance over all frames. With buckets of similar length it is little; with "
        "lengths mixed, training sees other statistics than evaluation. NeMo's own encoders do this and do train.",
        {"change of mean and variance": {n: round(c, 3) for n, c in sorted(change.items(), key=lambda e: -e[1])[:5]}},
        ["batch by duration (use_bucketing=true), or normalise over the valid frames only, or use LayerNorm"],
        0.3,
        where=worst,
    )
