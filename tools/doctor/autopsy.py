"""Finds the first module whose output is not finite, or exploding, by computing the batch again under watch.

Runs at the parameters with which it happened, before the optimizer has touched them; random states are as they were
before the batch; they and the buffers are put back after. In a run on several devices only this one does it, and
exchanges nothing with the others meanwhile (`alone`).
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from tools.doctor.alone import alone
from tools.doctor.devices import FROM_ANOTHER
from tools.doctor.trace import BadStep

log = logging.getLogger("doctor")

EXPLODING = 1e6  # largest absolute value: nothing in a model that trains comes near it
ENDED = "(the forward pass ended: "  # name of what stands for an error in the list of outputs


@dataclass
class Output:
    """What one module gave: its largest absolute value, and whether it, its input and its own parameters were
    finite."""

    name: str
    kind: str
    largest: float
    finite: bool
    inputs_finite: bool
    input_largest: float
    dtype: str
    growth: tuple[list[float], list[float]] | None = None


@dataclass
class Watch:
    """Hooks on modules for the length of a `with`; `outputs` in order of execution."""

    model: nn.Module
    leaves_only: bool = False
    times: tuple[int, ...] = ()  # lengths that a time axis may have
    counted: Callable = nullcontext  # within it a hook works, to count its time
    outputs: list[Output] = field(default_factory=list)

    def __enter__(self) -> Watch:
        self._handles = []
        for name, module in self.model.named_modules():
            recurrent = isinstance(module, nn.RNNBase)
            if not name or (self.leaves_only and not recurrent and next(module.children(), None) is not None):
                continue
            self._handles.append(module.register_forward_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(self, *exception) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str):
        def see(module, arguments, keywords, output):
            try:
                with self.counted(), torch.no_grad():
                    self._keep(name, module, (arguments, keywords), output)
            except Exception:  # no memory, a kind of tensor that knows no maximum: the model's own pass goes on
                log.debug("output of %s", name, exc_info=True)

        return see

    def _keep(self, name: str, module, arguments, output) -> None:
        given = tensors(arguments)
        for tensor in tensors(output)[:1]:
            largest = largest_value(tensor)
            finite = math.isfinite(largest)
            self.outputs.append(Output(
                name, type(module).__name__, largest, finite,
                all(math.isfinite(largest_value(t)) for t in given) if not finite else True,
                max((largest_value(t) for t in given), default=0.0) if not finite or largest > EXPLODING else 0.0,
                str(tensor.dtype).removeprefix("torch."),
                self._growth(module, tensor) if not finite or largest > 1e3 else None,
            ))

    def _growth(self, module, tensor: Tensor):
        """Largest absolute value in each frame, for outputs with a time axis that can be told."""
        if tensor.dim() < 3:
            return None
        axes = [axis for axis in range(tensor.dim()) if tensor.shape[axis] in self.times]
        if not axes and isinstance(module, nn.RNNBase):
            axes = [1 if module.batch_first else 0]
        if not axes:
            return None
        axis = axes[0]
        frames = tensor.detach().float().abs().movedim(axis, 0)
        if getattr(module, "bidirectional",
            False):  # one direction grows towards the last frame, the other to the first
            ahead, back = frames.chunk(2, dim=-1)
            frames = max((ahead, back.flip(0)), key=_swelling)
        per_frame = frames.flatten(1).amax(dim=1)
        keep = torch.linspace(0, len(per_frame) - 1, min(len(per_frame), 200), device=per_frame.device).long().unique()
        return keep.tolist(), per_frame[keep].tolist()


def _swelling(frames: Tensor) -> float:
    """How much larger the last frames of (T, ...) are than the first; infinite where they are not finite."""
    quarter = max(len(frames) // 4, 1)
    times = float(frames[-quarter:].amax() / frames[:quarter].amax().clamp(min=1e-30))
    return times if math.isfinite(times) else math.inf


def tensors(value) -> list[Tensor]:
    """Floating tensors in nested arguments or outputs, packed sequences unpacked to (T, B, D)."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() and value.numel() else []
    if isinstance(value, PackedSequence):
        return [pad_packed_sequence(value)[0]]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors(item)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors(item)]
    return []


def largest_value(tensor: Tensor) -> float:
    """Largest absolute value; NaN or inf where there is one."""
    return float(tensor.detach().abs().amax())


def broken_parameters(model: nn.Module) -> list[str]:
    """Names of parameters with a value that is not finite."""
    return [name for name, p in model.named_parameters() if not bool(torch.isfinite(p.detach()).all())]


class RandomState:
    """The random states at one moment, to compute a batch again as it was."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seed = torch.initial_seed()
        self.python, self.numpy = random.getstate(), np.random.get_state()
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


def examine_batch(model, batch, batch_idx: int, step: int, state: RandomState | None, call, gradients_bad: bool,
                  names: list[str], rerun: bool = True) -> BadStep:
    """The BadStep of a batch whose loss or gradient was not finite, with its origin and first module.

    Args:
        model: the LightningModule, gradients of the bad backward still in place, parameters not yet updated.
        batch, batch_idx: as `training_step` got them.
        step: optimizer steps done.
        state: random states before the batch, or None.
        call: listen.Call of the batch's CTC loss, or None.
        gradients_bad: whether a gradient is not finite.
        names: of the batch's utterances, "" where unknown.
        rerun: False where one device alone cannot compute the model.
    """
    loss_bad = call is None or not bool(call.finite())
    bad = BadStep(step, "loss" if loss_bad else "gradient", utterances=names)
    broken = broken_parameters(model)
    if broken:
        bad.origin, bad.module, bad.inputs_finite = "parameters", broken[0], False
        bad.details = {"parameters that are not finite": broken[:12], "of them": len(broken)}
        return bad
    if (rows := _bad_rows(batch)) is not None:
        bad.origin, bad.what = "audio", "audio"
        bad.utterances = [names[row] if row < len(names) else f"row {row}" for row in rows]
        return bad
    outputs: list[Output] = []
    # A step that optimizes by hand would take its steps again.
    if rerun and (is_nemo(model) or model.automatic_optimization):
        outputs = forward_again(model, batch, batch_idx, state, call)
        bad.depth = [(o.name, o.largest) for o in outputs]
    # The loss is no layer: where it alone is infinite, its targets are asked.
    layers = [o for o in outputs if "loss" not in o.kind.lower()]
    culprit = next((o for o in layers if not o.finite or o.largest > EXPLODING), None)
    if culprit is not None:
        bad.origin = "features" if "preprocessor" in culprit.name or "featurizer" in culprit.name else "forward"
        _describe(bad, culprit, outputs)
    elif call is not None and not bool(torch.isfinite(call.log_probs).all()):
        bad.origin, bad.what = "forward" if outputs == [] else "unknown", "log-probs"
        if outputs and outputs[-1].name.startswith(ENDED):
            bad.details["note"] = f"the batch could not be computed again: {outputs[-1].name[len(ENDED):-1]}"
        elif outputs:
            bad.details["note"] = "the same batch computed again is finite: dropout or the order of sums decides"
    elif loss_bad and call is not None:
        bad.origin = "loss"
        bad.details["loss"] = str(float(call.per_label()))
    elif gradients_bad:
        bad.origin = "backward"
        _nearest_to_loss(bad, model, outputs)
    if call is not None and loss_bad:
        bad.details.setdefault("log-probs are finite", bool(torch.isfinite(call.log_probs).all()))
        bad.details.setdefault("zero_infinity", call.zero_infinity)
    return bad


def first_bad(bad: BadStep, norm_before: float, scaler: bool, summed: bool) -> BadStep:
    """The BadStep with what the run's other steps say of it, told to the log.

    Args:
        norm_before: gradient norm of the step before, NaN where there was none.
        scaler: the gradient alone is not finite, under a gradient scaler that has lost its patience.
        summed: it alone is not finite, and is a sum over several devices.
    """
    if math.isfinite(norm_before):
        bad.details["gradient norm of the step before"] = norm_before
    if scaler:
        bad.origin = "backward"
    elif summed:
        bad.details[FROM_ANOTHER] = "it came from another device, where the loss is not finite: see its own log"
    log.warning("doctor: step %d: %s is not finite; origin: %s %s; utterances %s", bad.step, bad.what, bad.origin,
                bad.module, ", ".join(bad.utterances[:8]))
    return bad


def forward_again(model, batch, batch_idx: int, state: RandomState | None, call) -> list[Output]:
    """Outputs of all modules for the batch, computed once more; the model is as before afterwards."""
    now = RandomState(next(model.parameters()).device)
    buffers = [(module, name, buffer, buffer.clone()) for module in model.modules()
               for name, buffer in module._buffers.items() if buffer is not None]
    watch = Watch(model, times=tuple(times_of(batch, call)))
    if state is not None:
        state.restore()
        if now.seed != state.seed:  # the model seeded this step, after our hook and before its forward pass
            torch.manual_seed(now.seed)
    try:
        with torch.no_grad(), alone(), watch:
            if is_nemo(model) and isinstance(batch, (list, tuple)) and len(batch) >= 2:
                kind = "processed_signal" if batch[0].ndim == 3 else "input_signal"  # features, where they are kept
                with torch.autocast(model.device.type, **_autocast(model)):
                    # A copy: NeMo adds dither to the audio in place.
                    model.forward(**{kind: batch[0].clone(), f"{kind}_length": batch[1]})
            else:
                _quiet_step(model, batch, batch_idx)
    except Exception as error:  # what was seen up to the error is still worth reporting
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        watch.outputs.append(Output(f"{ENDED}{said})", "", 0.0, True, True, 0.0, ""))
    finally:
        now.restore()
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                module._buffers[name] = buffer
                buffer.copy_(value)
    return watch.outputs


def is_nemo(model) -> bool:
    """Whether the model is called as NeMo's CTC models are."""
    return hasattr(model, "preprocessor") and hasattr(model, "encoder") and hasattr(model, "decoder")


def times_of(batch, call) -> list[int]:
    """Lengths that a time axis of this batch can have: output frames and, at usual hops, feature frames."""
    times = []
    if call is not None:
        frames = call.log_probs.shape[0]
        times.append(frames)
        for stride in (2, 4, 8):
            times += [frames * stride + k for k in range(-stride, stride + 1)]
    return times


def _autocast(model) -> dict:
    precision = str(getattr(getattr(model, "_trainer", None), "precision", "32"))
    kinds = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    return {"dtype": kinds[precision]} if precision in kinds else {"enabled": False}


def loss_scale(trainer) -> float:
    """By what a gradient scaler has multiplied the loss that goes into the backward pass."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else scaler.get_scale()


def _quiet_step(model, batch, batch_idx: int) -> None:
    """training_step without its logging."""
    silenced = {name: (lambda *a, **k: None) for name in ("log", "log_dict")}
    for name, function in silenced.items():
        object.__setattr__(model, name, function)
    try:
        with torch.autocast(model.device.type, **_autocast(model)):
            model.training_step(batch, batch_idx)
    finally:
        for name in silenced:
            object.__delattr__(model, name)


def _bad_rows(batch) -> list[int] | None:
    """Rows of the batch's first floating tensor that are not finite, or None."""
    for tensor in tensors(list(batch.values()) if isinstance(batch, dict) else batch)[:1]:
        rows = (~torch.isfinite(tensor)).flatten(1).any(dim=1) if tensor.dim() > 1 else ~torch.isfinite(tensor)
        if bool(rows.any()):
            return torch.nonzero(rows).flatten().tolist()
    return None


def _describe(bad: BadStep, culprit: Output, outputs: list[Output]) -> None:
    bad.module, bad.kind, bad.inputs_finite = culprit.name, culprit.kind, culprit.inputs_finite
    bad.what = "loss"
    bad.growth = culprit.growth
    bad.details["largest output of that module"] = culprit.largest
    bad.details["largest value it was given"] = culprit.input_largest
    bad.details["dtype"] = culprit.dtype
    at = outputs.index(culprit)
    bad.depth = [(o.name, o.largest) for o in outputs[: at + 1]]


def _nearest_to_loss(bad: BadStep, model, outputs: list[Output]) -> None:
    """The last module in order of execution one of whose own parameters has a gradient that is not finite."""
    broken = {}
    for name, p in model.named_parameters():
        if p.grad is not None and not bool(torch.isfinite(p.grad).all()):
            broken.setdefault(name.rsplit(".", 1)[0], name)
    bad.details["parameters with such a gradient"] = len(broken)
    order = {o.name: k for k, o in enumerate(outputs)}
    modules = sorted(broken, key=lambda name: order.get(name, -1))
    if modules:
        kinds = {o.name: o.kind for o in outputs}
        bad.module, bad.kind = modules[-1], kinds.get(modules[-1], "")
