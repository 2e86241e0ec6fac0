"""The rate that a validation reports, of outputs that are known to be right or wrong.

The model's own validation step is run, and its forward pass too; only what that puts out is replaced: by log-probs that
spell the targets, each for two frames and a blank after it, or by blanks alone.

Shapes: B batch, S targets, T output frames, V labels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tools.doctor.finding import Finding
from tools.doctor.labels import decode_frames, must_decode
from tools.doctor.training_step import of_the_recipes, training_batch, without_trainer
from tools.doctor.metrics import CAUSES
from tools.doctor.registry import NotExamined, check

FRAMES = 3  # of the output, for each target
STEPS_KEPT = "_validation_step_outputs"  # where NeMo keeps what each step returned, None before the first


@dataclass
class Batch:
    """A batch of the model's validation, how many words are in its texts, and how many frames each target is given.

    spoken: True where the outputs are to spell the targets, False where they are to be blanks alone.
    behind: True where the frames behind the length of an output are to be a letter, which nobody may read.
    """

    given: tuple[Tensor, ...]
    words: int
    spoken: bool
    held: int = FRAMES - 1
    behind: bool = False


@check("validation", faults=("metric-averaged", "metric-not-collapsed", "metric-normalisation", "length-ignored"),
       needs=("model",))
def rate_of_known_outputs(subject):
    """The validation's WER of outputs that are known: 0 where they spell the texts, over batches the sum's."""
    probe = subject.probe
    model = probe.model
    if of_the_recipes(model):
        raise NotExamined("the recipes' models keep all texts of a validation and count once, over all of them")
    must_decode(probe)
    with probe.ready(calibrate=False), torch.no_grad():
        given = training_batch(probe)[:4]
        frames = model.forward(input_signal=given[0], input_signal_length=given[1])[1]
        whole, part = _batch(probe, given, frames, spoken=True), _batch(probe, given, frames / 6, spoken=False)
        if whole.words < 4 or whole.words == part.words:
            raise NotExamined("too few words fit into the outputs")
        right, wrong = _step(probe, whole), _step(probe, part)
        if (rate := _rate(right)) is None:
            raise NotExamined("the validation step returns no val_wer")
        if rate > 0.01:
            whole.held = 1
            yield _not_zero(rate, _rate(_step(probe, whole)))
            return
        read = _rate(_step(probe, replace(whole, behind=True)))
        if read is not None and read > 0.01:
            yield _reads_behind(read)
            return
        reported = _over_all(model, [right, wrong])
    if reported is None or _rate(wrong) is None:
        raise NotExamined("multi_validation_epoch_end gives no val_wer")
    summed, mean = part.words / (whole.words + part.words), (rate + _rate(wrong)) / 2
    if abs(_rate(wrong) - 1.0) > 0.01 or abs(summed - mean) < 0.02:
        raise NotExamined("outputs of blanks alone do not count as all words wrong")
    how, why, fix = CAUSES["metric-averaged"]
    if abs(reported - mean) < 0.005:
        yield Finding(
            "metric-averaged", "warning",
            f"Of a batch with {whole.words} words, all right, and one with {part.words}, all wrong, the model's "
            f"validation makes a WER of {reported:.1%}, where it is {summed:.1%}: {how}.", why,
            {"reported": round(reported, 4), "errors by words": round(summed, 4), "mean of the rates": round(mean, 4)},
            fix, 0.9, where="multi_validation_epoch_end")


def _not_zero(rate: float, without_repeats: float | None) -> Finding:
    """The finding on outputs that spell the texts, and whose rate is not 0."""
    id_ = "metric-not-collapsed" if without_repeats is not None and without_repeats <= 0.01 else "metric-normalisation"
    how, why, fix = CAUSES[id_]
    return Finding(
        id_, "warning",
        f"Of outputs that spell the references letter by letter the model's validation reports a WER of {rate:.1%}: "
        f"{how}.", why, {"WER of right outputs": round(rate, 4), "each letter for one frame": without_repeats}, fix, 0.85,
        where="validation_step")


def _reads_behind(rate: float) -> Finding:
    return Finding(
        "length-ignored", "warning",
        "Of outputs that spell the references, with a letter on the frames behind each length, the model's validation "
        f"reports a WER of {rate:.1%}: it reads the padding.",
        "The decoder is given all frames of the batch, or no lengths. What an untrained or unmasked model writes on padding "
        "counts as errors, the more the more the lengths in a batch differ.",
        {"WER of right outputs": round(rate, 4)},
        ["pass the encoder's lengths on: decoder_lengths=encoded_len, predictions_lengths=encoded_len"], 0.9,
        where="validation_step")


def _batch(probe, given: tuple[Tensor, ...], frames: Tensor, spoken: bool) -> Batch:
    """The batch given, its targets cut to what can be spelled in so many frames (B)."""
    audio, audio_lengths, targets, sizes = given
    sizes = torch.minimum(sizes, (frames // FRAMES).long().clamp(min=1))
    words = sum(len(decode_frames(probe, _spelled(row[:size].tolist(), len(probe.vocabulary))).split())
                for row, size in zip(targets, sizes.tolist()))
    return Batch((audio, audio_lengths, targets[:, : int(sizes.max())], sizes), words, spoken)


def _spelled(targets: list[int], blank: int, held: int = FRAMES - 1) -> list[int]:
    """Labels a frame of these targets: each held, and a blank after it."""
    return [label for target in targets for label in (target,) * held + (blank,) * (FRAMES - held)]


def _step(probe, batch: Batch):
    """What the model's validation step returns of the batch; raises NotExamined where it does not run so."""
    model, blank = probe.model, len(probe.vocabulary)
    own = model.forward

    def forward(*args, **kwargs):
        out, frames, *rest = own(*args, **kwargs)
        best = torch.full(out.shape[:2], blank, device=out.device)
        for row, size in enumerate(batch.given[3].tolist()) if batch.spoken else ():
            labels = _spelled(batch.given[2][row, :size].tolist(), blank, batch.held)[: best.shape[1]]
            best[row, : len(labels)] = torch.tensor(labels, device=out.device)
            if batch.behind:
                best[row, int(frames[row]) :] = max(batch.given[2][row, 0], 1 % blank)
        out = torch.full_like(out, -20.0).scatter_(2, best[:, :, None], 0.0).log_softmax(dim=-1)
        return (out, frames, best, *rest[1:])

    kept = vars(model).get(STEPS_KEPT)
    object.__setattr__(model, STEPS_KEPT, [])
    try:
        with without_trainer(model, forward):
            result = model.validation_step(batch.given, 0)
            return result if isinstance(result, dict) else (vars(model).get(STEPS_KEPT) or [None])[-1]
    except Exception as error:  # anybody's validation step
        line = " ".join(str(error).split())[:150]
        raise NotExamined(f"the validation step does not run here: {type(error).__name__}: {line}") from None
    finally:
        object.__setattr__(model, STEPS_KEPT, kept)


def _rate(metrics) -> float | None:
    """The val_wer of a step's or an epoch's metrics."""
    if not isinstance(metrics, dict):
        return None
    value = metrics.get("val_wer", (metrics.get("log") or {}).get("val_wer"))
    return float(value) if isinstance(value, (float, int)) or isinstance(value, Tensor) and value.numel() == 1 else None


def _over_all(model, outputs: list[dict]) -> float | None:
    try:
        with without_trainer(model, model.forward):
            return _rate(model.multi_validation_epoch_end(outputs))
    except Exception:  # anybody's; what it makes of its own batches is not known then
        return None
