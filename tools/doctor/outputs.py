"""What comes out: does the model run, are its outputs log-probabilities, do they depend on the input?"""

from __future__ import annotations

import math

import torch

from tools.doctor.finding import Finding
from tools.doctor.probe import relative, untouched
from tools.doctor.registry import NotExamined, check
from tools.doctor.tracing import describe, differs, first_difference, trace

NORMALISED = 0.02  # nats by which the log of the sum of probabilities may miss 0
PREFERRED = 5.0  # nats between a label and the blank that no weight asks for
TIED = 0.2  # share of outputs that are equal to others of their frame; of numbers that are not cut none is
CONFIDENT = 0.6  # probability that a frame must reach when the last layer's weights are large


@check("outputs", faults=("explodes",), needs=("model",))
def outputs_are_finite(subject):
    """Outputs are finite."""
    probe = subject.probe
    with probe.ready(calibrate=False), torch.no_grad():  # with its own running statistics, which may be what is broken
        x, lengths = probe.features()
        out, _ = probe.forward(x, lengths)
        if bool(torch.isfinite(out).all()):
            return
        steps = trace(probe.model, lambda: probe.forward(x, lengths))
    first = next((s for s in steps if s.left is not None and not bool(torch.isfinite(s.left).all())), None)
    tensors = [*probe.model.named_parameters(), *probe.model.named_buffers()]
    bad = [name for name, p in tensors if p.is_floating_point() and not bool(torch.isfinite(p).all())
           and not name.startswith("preprocessor.")]
    share = float((~torch.isfinite(out)).float().mean())
    yield Finding(
        "explodes",
        "prevents",
        f"{share:.0%} of the outputs are not finite, on features that are; first in "
        f"{describe(first) if first else 'the last step'}.",
        "Its weights or running statistics are not finite: the run that left them had diverged, or met one input that "
        "was not finite, which BatchNorm never forgets." if bad else
        "Values grow from layer to layer, or frame to frame, until float32 cannot hold them, or a logarithm, root or "
        "division meets 0.",
        {"not finite": share, "first module": describe(first) if first else "-",
         "parameters and statistics not finite": bad[:5]},
        ["start from a checkpoint before the first NaN, and lower the learning rate"] if bad else
        ["bound or normalise what comes before it: LayerNorm, a gated recurrence (LSTM, GRU) instead of ReLU, smaller "
         "initial weights"],
        0.95,
        where=first.name if first else "",
    )


@check("outputs", faults=("not-log-probs", "softmax-axis"), needs=("model",))
def outputs_are_log_probs(subject):
    """Outputs are log-probabilities over the labels."""
    probe = subject.probe
    with probe.ready(), torch.no_grad():
        x, lengths = probe.features()
        out, out_lengths = probe.forward(x, lengths)
        if not bool(torch.isfinite(out).all()):
            raise NotExamined("outputs are not finite")
        width = len(probe.vocabulary) + 1
        if out.dim() != 3:
            raise NotExamined(f"outputs have {out.dim()} axes, not (B, T, V+1)")
        off = {axis: float(torch.logsumexp(out.double(), dim=axis).abs().mean()) for axis in (0, 1, 2)}
        if off[2] > NORMALISED:
            yield from _not_normalised(probe, x, lengths, out, off)
            return
        sharpest, off_sharp = _sharpest(probe, x, lengths)
    if off_sharp > NORMALISED:
        yield Finding(
            "not-log-probs",
            "prevents" if off_sharp > 1 else "warning",  # clamped at -5 (0.17) it still trains, if not as well
            f"With large weights in the last layer the log of the sum over the labels is {off_sharp:.2f}, not 0: as a "
            "model gets sure of itself, its outputs stop being log-probabilities.",
            "They are changed after log_softmax: clamped from below, say, against infinities. What lies at the bound "
            "has no gradient, and CTC counts more than there is.",
            {"log of the sum over labels": off[2], "with large weights": off_sharp},
            ["return log_softmax(scores, dim=-1) as it is: CTC's losses take -100 as well as -5"],
            0.95,
            where="decoder",
        )
        return
    if sharpest is not None and sharpest < CONFIDENT:
        yield Finding(
            "not-log-probs",
            "prevents",
            f"However large the last layer's weights, no label gets a probability over {sharpest:.2f}.",
            "The scores pass through softmax (or a bounded function) before log_softmax: probabilities between 0 and 1 "
            "are taken for scores, so the outputs stay near uniform and the loss cannot fall.",
            {"largest probability": sharpest, "labels": width,
             "of a softmax of a softmax": math.e / (math.e + out.shape[2] - 1)},
            ["apply log_softmax once, to the raw scores of the last linear layer, and nothing before it",
             "where the scores are cosines, multiply them by 10 to 30, or by a parameter that begins there"],
            0.95,
            where="decoder",
        )


def _not_normalised(probe, x, lengths, out, off):
    evidence = {"log of the sum over labels": off[2], "over time": off[1], "over the batch": off[0],
                "smallest": float(out.min()), "largest": float(out.max())}
    names = {0: "the batch", 1: "time"}
    axis = min((0, 1), key=lambda a: off[a])
    if off[axis] < NORMALISED and out.shape[axis] > 1:
        yield Finding(
            "softmax-axis",
            "prevents",
            f"Probabilities sum to 1 over {names[axis]}, not over the labels.",
            f"log_softmax is taken over axis {axis} of (B, T, V+1): frames or utterances compete with each other, "
            "labels do not.",
            evidence,
            ["log_softmax(scores, dim=-1) on scores of shape (B, T, V+1)"],
            0.98,
            where="decoder",
        )
        return
    # A reshape before the softmax can hide the axis: normalised over another grouping of the same numbers.
    probability = float(out.min()) >= 0 and float(out.max()) <= 1
    sums = float(out.sum(dim=2).sub(1).abs().mean())
    if probability and sums < NORMALISED:
        seen = "Outputs are probabilities, not their logarithms."
        cause = "softmax is applied where log_softmax belongs."
    else:
        seen = f"Outputs are not log-probabilities: the log of their sum over the labels is {off[2]:.2f}, not 0."
        cause = "log_softmax is missing (raw scores reach the loss), or is taken over another axis or too early."
    yield Finding(
        "not-log-probs",
        "prevents" if _loss_minds(probe, x, lengths, out) else "note",
        seen,
        cause + " CTC adds up log-probabilities: of anything else it makes numbers without meaning, below 0 or growing "
        "without limit.",
        evidence,
        ["decoder: return torch.nn.functional.log_softmax(scores, dim=-1)"],
        0.95,
        where="decoder",
    )


def _loss_minds(probe, x, lengths, out) -> bool:
    """Whether the loss takes what it is given for log-probabilities (True), or normalises on its own."""
    from tools.doctor.loss import call_loss

    targets = torch.arange(1, 4, device=out.device)[None].repeat(out.shape[0], 1).clamp(max=out.shape[2] - 2)
    sizes = torch.full((out.shape[0],), 3, device=out.device)
    frames = torch.full((out.shape[0],), out.shape[1], device=out.device)
    try:
        raw = call_loss(probe.model, out, targets, frames, sizes)
        normalised = call_loss(probe.model, out.log_softmax(dim=-1), targets, frames, sizes)
    except Exception:  # anybody's loss
        return True
    return abs(float(raw) - float(normalised)) > 1e-3 * max(abs(float(normalised)), 1.0)


def _sharpest(probe, x, lengths) -> tuple[float | None, float]:
    """With a last layer whose weights are far larger: the largest probability, on half of the frames at least, and
    how far the log of the sum over labels is from 0. (None, 0) where that cannot be told."""
    weights = list(probe.model.decoder.parameters())
    if not weights:
        return None, 0.0
    width = len(probe.vocabulary) + 1
    # A bias over the labels makes scores differ even where the input has died away before this layer.
    generator = torch.Generator().manual_seed(1)
    for p in weights[-2:]:
        if p.dim() == 1 and p.shape[0] == width:
            p.copy_((torch.randn(p.shape, generator=generator) * 60).to(p))
        elif p.dim() > 1:
            p.mul_(200)
    out, _ = probe.forward(x, lengths)
    if not bool(torch.isfinite(out).all()):
        return None, 0.0
    return float(out.exp().amax(dim=2).flatten().median()), float(torch.logsumexp(out.double(), 2).abs().mean())


@check("outputs", faults=("no-gradient",), needs=("model",))
def scores_are_not_cut(subject):
    """Scores of labels are not cut off below or above."""
    probe = subject.probe
    with probe.ready(), torch.no_grad():
        out = probe.forward(*probe.features())[0].float()
    shares = {}
    for end, edge in (("lowest", out.amin(dim=-1, keepdim=True)), ("highest", out.amax(dim=-1, keepdim=True))):
        same = (out == edge).sum(dim=-1)
        # A frame in which all are equal, such as one of padding, tells nothing of an edge.
        shares[end] = float((same * ((same > 1) & (same < out.shape[-1]))).float().mean()) / out.shape[-1]
    end = max(shares, key=shares.get)
    if not shares[end] > TIED or not bool((out[0] != out[0, :1]).any()):
        return  # outputs that are always the same are told by another check
    yield Finding(
        "no-gradient", "warning",
        f"{shares[end]:.0%} of all outputs are exactly the {end} of their frame, shared with other labels: the scores are "
        "cut off before the softmax.",
        "A ReLU or a clamp stands behind the last layer. Where it cuts, no gradient comes back, and no label can be made "
        f"{'less' if end == 'lowest' else 'more'} probable than the others that are cut.",
        {f"share at the {name}": round(share, 3) for name, share in shares.items()},
        ["the last layer is linear: take the activation between it and log_softmax out"], 0.85, where="decoder")


@check("outputs", faults=("blank-index",), needs=("model",))
def no_label_is_preferred(subject):
    """Only weights prefer the blank or a letter: with the decoder's at 0, all are alike."""
    probe = subject.probe
    weights = list(probe.model.decoder.parameters())
    width = len(probe.vocabulary) + 1
    if not weights or width < 3:
        raise NotExamined("the decoder has no weights or no labels")
    with probe.ready(), torch.no_grad():
        for p in weights:
            p.zero_()
        out, _ = probe.forward(*probe.features())
    if out.dim() != 3 or out.shape[2] != width or bool(torch.isnan(out).any()):
        raise NotExamined("outputs with a decoder of 0 say nothing")
    level = out.double().flatten(0, 1).mean(dim=0)
    lead = float(level[-1] - level[:-1].median())
    if abs(lead) < PREFERRED:
        return
    yield Finding(
        "blank-index",
        "prevents",
        f"With the decoder's weights at 0 the blank is {'less' if lead < 0 else 'more'} likely than a label by a "
        f"factor of e^{abs(lead):.3g}: the code itself {'suppresses' if lead < 0 else 'prefers'} it.",
        "CTC needs blanks between equal letters and while nothing is said: without them no path fits, or letters have "
        "to stand in for them. That a young model writes blanks only is no fault; it is how each run begins."
        if lead < 0 else "Blanks swallow the gradient of all labels.",
        {"log-prob of the blank": float(level[-1]), "of a label, median": float(level[:-1].median())},
        ["leave the scores as the last layer gives them; a penalty on blanks belongs into decoding, where it may be "
         "tuned"],
        0.95,
        where="decoder",
    )


@check("outputs", faults=("batch-leak",), needs=("model",))
def nothing_is_carried_over(subject):
    """The batch before does not change the outputs."""
    probe = subject.probe
    with untouched(probe.model), torch.no_grad():
        probe.model.eval()
        x, lengths = probe.features()
        other = probe.made_up_features([x.shape[2]] * len(x), seed=9)[0] * float(x.std())
        found = []
        for before in (other, other.flip(2) * 3):
            torch.manual_seed(1)
            probe.forward(before, lengths)
            torch.manual_seed(1)
            found.append(probe.forward(x, lengths)[0])
    one, two = found
    if one.shape != two.shape or not bool(torch.isfinite(one).all() & torch.isfinite(two).all()):
        raise NotExamined("outputs are not finite")
    change = relative(one - two, one)
    if change > 2e-3:
        yield Finding(
            "batch-leak", "prevents",
            f"With another batch before it, the same batch gets outputs that differ by {change:.0%} of their spread.",
            "Something is kept from one call of forward to the next: the state of a recurrence, an average that is "
            "updated in evaluation too. What is learned hangs on what came before.",
            {"relative change": change},
            ["begin each batch with a state of zeros: nn.GRU(x) without a second argument"], 0.95, where="encoder",
        )


@check("outputs", faults=("train-eval-differ",), needs=("model",))
def outputs_repeat(subject):
    """The same input gives the same output in eval mode."""
    probe = subject.probe
    with untouched(probe.model), torch.no_grad():  # with whatever chance the model has of its own
        probe.model.eval()
        x, lengths = probe.features()
        torch.manual_seed(1)
        steps = trace(probe.model, lambda: probe.forward(x, lengths))
        one = probe.forward(x, lengths)[0]
        torch.manual_seed(2)
        two = probe.forward(x, lengths)[0]
        again = trace(probe.model, lambda: probe.forward(x, lengths))
        heard = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            audio, samples = probe.audio_batch(probe.items())
            heard.append(probe.model.forward(input_signal=audio, input_signal_length=samples)[0].float())
    if not bool(torch.isfinite(one).all()):
        raise NotExamined("outputs are not finite")
    change = relative(one - two, one) if one.shape == two.shape else 1.0
    if change <= 1e-3 and heard[0].shape == heard[1].shape:
        change, steps = relative(heard[0] - heard[1], heard[0]), []
    if change > 1e-3:
        found = first_difference(steps, again, 1e-4)
        name = ("before " if found and found[2] else "") + describe(found[0]) if found else "code between modules"
        name = name if steps else "between the audio and the encoder"
        yield Finding(
            "train-eval-differ", "warning",
            f"In eval mode the same input gives outputs that differ by {change:.0%} of their spread from one time to "
            "the "
            "next.",
            "Dropout or augmentation is on in evaluation: torch.nn.functional.dropout(x, p) without "
            "training=self.training, "
            "or a mask that does not ask for the mode. Validation is worse than the model, and not repeatable.",
            {"relative change": change, "first": name},
            ["torch.nn.functional.dropout(x, p, training=self.training)"], 0.95,
            where=found[0].name if found else "encoder",
        )


def _depends_on_longer(probe) -> bool:
    """Whether outputs move with the input once it is long: those that come out late leave a short one without any."""
    lengths = torch.tensor([1200], device=probe.device)
    one, two = (probe.forward(probe.made_up_features([1200], seed=seed)[0], lengths)[0] for seed in (7, 8))
    return bool((one - two).abs().max() > 1e-3 * one.abs().mean().clamp(min=1e-3))


@check("outputs", faults=("output-constant", "vanishes"), needs=("model",))
def output_depends_on_input(subject):
    """Outputs depend on the input."""
    probe = subject.probe
    with probe.ready(), torch.no_grad():
        x, lengths = probe.features()
        other, _ = probe.made_up_features([x.shape[2]] * x.shape[0], seed=7)
        other = other * float(x.std()) * (x != 0).any(dim=1, keepdim=True)
        out, _ = probe.forward(x, lengths)
        changed, _ = probe.forward(other, lengths)
        if not bool(torch.isfinite(out).all() & torch.isfinite(changed).all()):
            raise NotExamined("outputs are not finite")
        change = float((out - changed).abs().max())
        size = float((out - out.mean(dim=2, keepdim=True)).square().mean().sqrt())
        if change > 2e-5 * max(size, float(out.abs().mean()), 1e-3):
            return
        if _depends_on_longer(probe):
            raise NotExamined("outputs depend on inputs of 12 s, and not on shorter ones")
        one = trace(probe.model, lambda: probe.forward(x, lengths))
        two = trace(probe.model, lambda: probe.forward(other, lengths))
    dead = None
    for a, b in zip(one, two):
        if a.left is not None and differs(a.entered, b.entered, 1e-5) and not differs(a.left, b.left, 1e-6):
            dead = a
            break
    encoded = [(a, b) for a, b in zip(one, two) if a.name.startswith("encoder")]
    # Fading is gradual: what leaves the encoder still differs, but hardly. A full signal there was cut off after it.
    faint = differs(encoded[-1][0].left, encoded[-1][1].left, 1e-12) if encoded else 0.0
    if dead is None and 0 < faint < 1e-2 or dead is None and change > 0 and faint:
        yield Finding(
            "vanishes", "prevents",
            f"Outputs for quite different inputs differ by {change:.1g} at most: next to nothing of the input is left.",
            "From layer to layer the input's share shrinks (tiny weights or gains, saturated activations), until it is "
            "below what float32 resolves in the outputs.",
            {"largest change of an output": change, "spread of the outputs": size},
            ["torch's default initialisation, normalisation with a gain of 1, residual connections"],
            0.9, where="encoder",
        )
        return
    yield Finding(
        "output-constant",
        "prevents",
        f"Outputs are the same for different inputs (largest change {change:.1g})"
        + (f"; the input's influence ends in {describe(dead)}." if dead else "."),
        "Something on the way replaces or drops the signal: weights of 0, a dropout or mask that leaves nothing, an "
        "activation that is 0 everywhere, a result that is computed and then not used.",
        {"largest change of an output": change, "spread of the outputs": size,
         "where it ends": describe(dead) if dead else "not in one module: look at the code between modules"},
        ["follow the tensor through forward: print its standard deviation over inputs after each layer"],
        0.95,
        where=dead.name if dead else "",
    )
