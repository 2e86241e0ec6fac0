"""Attention and positions of a model that has not been trained: softmaxes that leave a gradient, near frames before far
ones, content above positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tools.doctor.finding import Finding
from tools.doctor.registry import NotExamined, check
from tools.doctor.trained import look_trained

FRAMES = 800  # of features
FEWEST = 20  # frames to attend to
ONE_HOT = 0.7  # mean of the largest weight of each frame; of freshly drawn layers it is below 0.2
FARTHER = 1.3  # mean distance of what a frame hears, by that of all frames it may hear; freshly drawn: 1, with biases less
ITEMS, OWN = 6, 0.08  # inputs, and the share of the outputs' variance that has to come from them
SOFTMAX = {torch.softmax, Tensor.softmax, F.softmax}


class Attentions(TorchFunctionMode):
    """Collects (module, mean of the largest weight of each frame, `farther`) of every self-attention computed under it.

    Anybody's code is seen, as all of it calls torch's softmax or its scaled_dot_product_attention.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.found: list[tuple[str, float, float]] = []
        self._within: list[str] = []
        self._handles = []
        for name, module in model.named_modules():
            self._handles += [module.register_forward_pre_hook(lambda module, args, name=name: self._within.append(name)),
                              module.register_forward_hook(self._leave, always_call=True)]

    def _leave(self, module, args, out) -> None:
        self._within.pop()

    def __exit__(self, *error):
        for handle in self._handles:
            handle.remove()
        return super().__exit__(*error)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        weights = result if func in SOFTMAX else None
        if func is F.scaled_dot_product_attention and not (kwargs or {}).get("enable_gqa"):
            weights = _weights(*args, **(kwargs or {}))
        if weights is not None and weights.dim() >= 3 and weights.shape[-1] == weights.shape[-2] >= FEWEST:
            weights = weights.detach().float()
            self.found.append((self._within[-1] if self._within else "", float(weights.amax(dim=-1).mean()), farther(weights)))
        return result


def _weights(query, key, value=None, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_) -> Tensor:
    """What scaled_dot_product_attention multiplies values by; without a causal mask, which makes first frames one-hot."""
    scores = query.detach().float() @ key.detach().float().transpose(-1, -2) * (scale or 1 / math.sqrt(query.shape[-1]))
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(dim=-1).nan_to_num(1 / scores.shape[-1])


def farther(weights: Tensor) -> float:
    """Mean distance in frames of what is attended to, by that of all that may be (weight above 0); weights (..., T, T)."""
    place = torch.arange(weights.shape[-1], device=weights.device)
    away = (place[:, None] - place[None]).abs().float()
    allowed = (weights > 0).float()
    usual = (allowed * away).sum(dim=-1) / allowed.sum(dim=-1).clamp(min=1)
    return float((weights * away).sum(dim=-1).mean() / usual.mean().clamp(min=1e-6))


def _fresh_attentions(probe) -> list[tuple[str, float, float]]:
    """What Attentions finds on one utterance; raises NotExamined for a trained model."""
    _untrained(probe)
    with probe.ready(), torch.no_grad():
        x, _ = probe.made_up_features([FRAMES], seed=5)
        with Attentions(probe.model) as seen:
            probe.forward(x, torch.tensor([FRAMES], device=x.device))
    return seen.found


def _untrained(probe) -> None:
    if look_trained(dict(probe.model.named_parameters())) is not False:
        raise NotExamined("the model looks trained: what it attends to is its own affair")


def _far_first(far: list, found: list) -> Finding:
    return Finding(
        "time-scrambled", "warning",
        f"{len(far)} of {len(found)} attentions of freshly drawn layers hear the farthest frames most: what they attend to is "
        f"{max(ratio for _, ratio in far):.1f} times as far away as the mean of all frames that they may hear.",
        "Biases or decays by distance have the wrong sign: ALiBi takes slope * distance away from the scores, so that near "
        "frames are heard most. Sounds are spelt by what is near; such layers have to learn against their positions.",
        {"distance, by that of all frames": {name: round(ratio, 2) for name, _, ratio in found[:12]}},
        ["scores - slope * (i - j).abs(), not +", "key minus query for a causal one: slope * (j - i), which is never above 0"],
        0.9, where=far[0][0])


@check("depth", faults=("vanishes", "time-scrambled"), needs=("model",))
def attention_is_soft(subject):
    """Attention of fresh layers is spread over frames: not put on one, and not on the farthest."""
    found = _fresh_attentions(subject.probe)
    far = [(name, ratio) for name, _, ratio in found if ratio > FARTHER]
    if len(far) > 0.5 * len(found):
        yield _far_first(far, found)
        return
    hard = [(name, top) for name, top, _ in found if top > ONE_HOT]
    if not hard:
        return
    yield Finding(
        "vanishes", "prevents" if len(hard) > 0.5 * len(found) else "warning",
        f"{len(hard)} of {len(found)} attentions of freshly drawn layers put {hard[0][1]:.0%} of a frame's weight on one "
        "other frame.",
        "Their scores are far too large before the softmax: multiplied by the root of the head's size where it divides, or "
        "inputs that are not normalised. The softmax is saturated: queries and keys get next to no gradient, and every frame "
        "reads one other that chance has chosen.",
        {"weight on one frame": {name: round(top, 3) for name, top, _ in found[:12]}},
        ["scores = q @ k.transpose(-1, -2) / math.sqrt(d_k), d_k the size of one head", "LayerNorm before q, k and v"], 0.93,
        where=hard[0][0])


@check("depth", faults=("output-constant",), needs=("model",))
def content_outweighs_positions(subject):
    """Outputs of fresh layers differ by what is said, not only by its place."""
    probe = subject.probe
    _untrained(probe)
    probe.must_repeat()
    with probe.ready(), torch.no_grad():
        lengths = torch.tensor([FRAMES // 2], device=probe.device)
        outs = torch.stack([probe.forward(probe.made_up_features([FRAMES // 2], seed=20 + k)[0], lengths)[0][0].double()
                            for k in range(ITEMS)])
    outs = outs[:, outs.shape[1] // 10 : -(outs.shape[1] // 10) or None]  # the edges know where they are
    if outs.shape[1] < FEWEST or not bool(torch.isfinite(outs).all()):
        raise NotExamined("outputs are too few, or not finite")
    by_place = outs.mean(dim=0)
    content = float((outs - by_place).square().sum(dim=0).mean()) / (ITEMS - 1)
    place = max(float(by_place.var(dim=0).mean()) - content / ITEMS, 0.0)
    share = content / max(content + place, 1e-30)
    if share >= OWN:
        return
    yield Finding(
        "output-constant", "warning",
        f"Of what changes in the outputs of freshly drawn layers {share:.1%} comes from the input, the rest is the same for every "
        "input at the same time of it.",
        "Positional encodings are far larger than what they are added to: features or embeddings divided by the root of the "
        "width where they are multiplied by it, or encodings that are not scaled. The layers above hear the place and hardly "
        "the speech.",
        {"share of the input": round(share, 5), "spread by input": math.sqrt(content), "spread by place": math.sqrt(place)},
        ["x * math.sqrt(d_model) + positions, as in Vaswani et al. 2017 (xscaling: true in NeMo's Conformer)",
         "LayerNorm before positions are added"], 0.9, where="encoder")
