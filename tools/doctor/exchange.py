"""Is one batch learned? Where it is not, each part of the model is exchanged for a plain one, and the batch tried again.

It needs no idea of what may be wrong: the part without which the batch is learned holds the fault. Shapes: B batch, D
features, T frames, S labels, V vocabulary.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tools.doctor.finding import Finding
from tools.doctor.listen import Call, constant_level, target_counts
from tools.doctor.registry import NotExamined, check
from tools.doctor.training_step import of_the_recipes, training_batch, without_trainer

RATES = (3e-3, 5e-4)  # of AdamW: small models and recurrences, then deep ones
WARMUP = 10  # steps
STEPS = 150  # of the plain model, in which it learns a batch
SLOWER = 3  # times as many steps as the plain model's may be needed, at least FEWEST
FEWEST = 90
LOOK = 10  # steps from look to look
UTTERANCES, SHORTER = 8, 0.8  # of the batch; length of every fourth by that of the others
LEARNED, FLAT, ABOVE = 0.6, 0.85, 1.1  # of the loss of a model that does not listen
PARTS = ("features", "encoder", "decoder")
NAMES = {"step": "its forward() and training step", "features": "the preprocessor", "encoder": "the encoder",
         "decoder": "the decoder"}
FIXES = {
    "step": ["look in forward(), training_step() and the loss for what is done between decoder and loss: other lengths, a "
             "transpose, a detach, a term that outweighs CTC", "delete the override and try NeMo's own"],
    "features": ["preprocessor: AudioToMelSpectrogramPreprocessor with normalize=per_feature, as NeMo's examples have it"],
    "encoder": ["put its blocks back one at a time between a plain input and output layer, and try this again",
                "look for what all frames share, for a scale that is far from 1 and for a layer with no gradient"],
    "decoder": ["decoder: nemo.collections.asr.modules.ConvASRDecoder: one projection, then log_softmax over the labels"],
}


@dataclass
class Trial:
    """How far one batch was learned.

    Attributes:
        steps: that were made, over all rates.
        loss: nats a label of the outputs, by torch's CTC, the least that was seen at a look.
    """

    steps: int
    loss: float

    def learned(self, level: float) -> bool:
        return self.loss < LEARNED * level

    def flat(self, level: float) -> bool:
        return not self.loss < FLAT * level


class PlainEncoder(nn.Module):
    """A strided convolution, a bidirectional GRU, a projection: (B, D, T) to (B, D', ceil(T / stride))."""

    def __init__(self, feat_in: int, feat_out: int, stride: int, hidden: int = 64):
        super().__init__()
        self.stride = stride
        self.convolution = nn.Conv1d(feat_in, hidden, 2 * stride + 1, stride=stride, padding=stride)
        self.norm = nn.LayerNorm(hidden)
        self.gru = nn.GRU(hidden, hidden, bidirectional=True, batch_first=True)
        self.projection = nn.Linear(2 * hidden, feat_out)

    def forward(self, audio_signal: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        inside = torch.arange(audio_signal.shape[2], device=length.device) < length[:, None]
        hidden = self.norm(self.convolution(audio_signal * inside[:, None]).relu().transpose(1, 2))
        frames = strided(length, self.stride)
        packed = nn.utils.rnn.pack_padded_sequence(hidden, frames.cpu(), batch_first=True, enforce_sorted=False)
        both, _ = nn.utils.rnn.pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=hidden.shape[1])
        return self.projection(both).transpose(1, 2), frames


class PlainDecoder(nn.Module):
    """A projection: (B, D', T') to (B, T', V+1)."""

    def __init__(self, feat_in: int, labels: int):
        super().__init__()
        self.projection = nn.Conv1d(feat_in, labels, 1)

    def forward(self, encoder_output: Tensor) -> Tensor:
        return self.projection(encoder_output).transpose(1, 2)


def alike(probe) -> list:
    """Utterances cut to one length, but for some: by its length alone an utterance could be learned without listening."""
    items = probe.items(UTTERANCES)
    samples = min(len(item.audio) for item in items)
    return [replace(item, audio=item.audio[: int(samples * (1.0 if i % 4 else SHORTER))]) for i, item in enumerate(items)]


def strided(lengths: Tensor, stride: int) -> Tensor:
    """Frames that are left of `lengths` (B)."""
    return torch.div(lengths + stride - 1, stride, rounding_mode="floor")


@check("exchange", faults=("batch-not-learned",), needs=("model",))
def one_batch_is_learned(subject):
    """One batch is learned, by the model as it is, or with which of its parts exchanged."""
    probe = subject.probe
    if len(probe.vocabulary) < 3:
        raise NotExamined("the model names no labels")
    with probe.ready(train=True):
        bench = Bench(subject)
        plain = bench.train(PARTS, STEPS, RATES[:1])
        if not plain.learned(bench.level):
            raise NotExamined(f"plain parts have not learned the batch in {plain.steps} steps either")
        steps = max(SLOWER * plain.steps, FEWEST)
        bench.affordable(steps)
        own = bench.train(None, steps)
        if own.learned(bench.level):
            return
        # Where in an utterance which letters come can be learned without listening, and better than the plain model does.
        bench.level = min(bench.level, *(bench.train(parts, steps, deaf=True).loss for parts in (PARTS, ())))
        if not own.flat(bench.level):
            raise NotExamined(f"the batch is learned slowly: {own.loss:.2f} nats a label in {steps} steps, where "
                              f"{bench.level:.2f} is that of a model that does not listen")
        tried = {"step": bench.train((), steps)}
        if not tried["step"].learned(bench.level):
            tried |= {name: bench.train((name,), steps) for name in PARTS}
    yield _finding(own, plain, tried, steps, bench.level)


class Bench:
    """One batch and the trials with it. To be used inside `probe.ready(train=True)`.

    Attributes:
        level: nats a label of a model that does not listen, on this batch: at first of the best output that is the same in
            all frames.
    """

    def __init__(self, subject):
        self.subject, self.probe, self.model = subject, subject.probe, subject.probe.model
        self.audio, self.lengths, self.targets, self.sizes, self.ids = training_batch(self.probe, alike(self.probe))
        self.begun = [(value, value.detach().clone()) for value in [*self.model.parameters(), *self.model.buffers()]]
        try:
            with torch.no_grad():
                x, frames = self.model.preprocessor(input_signal=self.audio, length=self.lengths)
                hidden, _ = self.model.encoder(audio_signal=x, length=frames)
                scores = self.model.decoder(encoder_output=hidden)
        except Exception as error:  # anybody's modules
            raise NotExamined("preprocessor, encoder and decoder do not run one after the other "
                              f"({type(error).__name__}: {' '.join(str(error).split())[:100]})") from None
        if not x.dim() == hidden.dim() == scores.dim() == 3:
            raise NotExamined("preprocessor, encoder and decoder pass on something else than (B, D, T)")
        self.mels, self.width, self.scores = x.shape[1], hidden.shape[1], scores.shape[2]
        self.stride = min(max(round(x.shape[2] / max(hidden.shape[2], 1)), 1), 8)
        room = strided(frames.cpu(), self.stride)
        call = Call(torch.zeros(int(room.max()), len(room), self.scores), self.targets.cpu(), room, self.sizes.cpu(),
                    self.scores - 1, "none", True, torch.zeros(()))
        self.level = constant_level(call, target_counts(call))
        if not math.isfinite(self.level):
            raise NotExamined("no target of the batch fits into the output")

    def affordable(self, steps: int) -> None:
        """Raises NotExamined where a healthy model of this size would hardly learn the batch in the time that is left."""
        begin = time.perf_counter()
        self.train(None, 2, RATES[:1])
        seconds = (time.perf_counter() - begin) / 2
        if seconds * steps > 0.6 * self.subject.seconds_left():
            raise NotExamined(f"{steps} steps of {seconds:.1f} s do not fit into the time: python -m tools.doctor check ... "
                              f"--only exchange --seconds {max(math.ceil(20 * seconds * steps / 60) * 60, 120)}")

    def train(self, plain: tuple[str, ...] | None, steps: int, rates: tuple[float, ...] = RATES,
              deaf: bool = False) -> Trial:
        """Learns the batch from the start, at one rate after the other until it is learned.

        Args:
            plain: which of PARTS are plain; None for the model's own training step, in place of a plain one.
            deaf: all features are 0. Then it learns to its last step.
        """
        made, least = 0, math.inf
        for rate in rates:
            with torch.no_grad():
                for value, begun in self.begun:
                    value.copy_(begun) if value.shape == begun.shape else value.set_(begun.clone())
            parts = self._parts(plain or ())
            every = [p for part in parts.values() for p in part.parameters()] if plain else self.model.parameters()
            wanted = [p for p in every if p.requires_grad]
            optimizer = torch.optim.AdamW(wanted, lr=rate, weight_decay=0.0)
            for step in range(1, steps + 1):
                if self.subject.seconds_left() < 1:
                    raise NotExamined(f"the time was over after {made} steps of a trial: python -m tools.doctor check ... "
                                      "--only exchange --seconds 600")
                for group in optimizer.param_groups:
                    group["lr"] = rate * min(step / WARMUP, 1.0)
                optimizer.zero_grad(set_to_none=True)
                loss = self._own_step() if plain is None else self._loss(parts, deaf)
                if loss is not None and loss.requires_grad:
                    loss.sum().backward()
                if not all(torch.isfinite(p.grad).all() for p in wanted if p.grad is not None):
                    break
                torch.nn.utils.clip_grad_norm_(wanted, 1.0)
                optimizer.step()
                made += 1
                if step % LOOK == 0 or step == steps:
                    with torch.no_grad():
                        now = float(self._loss(parts, deaf))
                    least = min(least, now) if math.isfinite(now) else least
                    if least < LEARNED * self.level and not deaf:
                        return Trial(made, least)
        return Trial(made, least)

    def _parts(self, plain: tuple[str, ...]) -> dict[str, nn.Module]:
        """Name -> module, the model's own or a fresh plain one."""
        torch.manual_seed(0)
        own = {"features": self.model.preprocessor, "encoder": self.model.encoder, "decoder": self.model.decoder}
        return own | {name: self._plain(name).to(self.probe.device).train() for name in plain}

    def _plain(self, name: str) -> nn.Module:
        if name == "encoder":
            return PlainEncoder(self.mels, self.width, self.stride)
        if name == "decoder":
            return PlainDecoder(self.width, self.scores)
        from nemo.collections.asr.modules import AudioToMelSpectrogramPreprocessor

        return AudioToMelSpectrogramPreprocessor(sample_rate=self.probe.sample_rate, features=self.mels, dither=0.0,
                                                 pad_to=0, normalize="per_feature")

    def _loss(self, parts: dict[str, nn.Module], deaf: bool = False) -> Tensor:
        """Nats a label by torch's CTC of the parts run one after the other; the last output is the blank."""
        x, frames = parts["features"](input_signal=self.audio, length=self.lengths)
        hidden, frames = parts["encoder"](audio_signal=torch.zeros_like(x) if deaf else x, length=frames)
        scores = parts["decoder"](encoder_output=hidden).float().log_softmax(dim=-1)
        losses = F.ctc_loss(scores.transpose(0, 1), self.targets, frames.clamp(max=scores.shape[1]), self.sizes,
                            blank=self.scores - 1, reduction="none", zero_infinity=True)
        return losses.sum() / self.sizes.sum()

    def _own_step(self) -> Tensor | None:
        """The model's own training step; None where it has gone backwards by itself."""
        batch = (self.audio, self.lengths, self.targets, self.sizes, self.ids)
        with without_trainer(self.model, self.model.forward):
            try:
                result = self.model.training_step(batch if of_the_recipes(self.model) else batch[:4], 0)
            except Exception as error:  # anybody's training step
                raise NotExamined("the training step does not run outside a trainer "
                                  f"({type(error).__name__}: {' '.join(str(error).split())[:100]})") from None
        return result["loss"] if isinstance(result, dict) else result


def _finding(own: Trial, plain: Trial, tried: dict[str, Trial], steps: int, level: float) -> Finding:
    helps = [name for name in tried if tried[name].learned(level)]
    rates = " and ".join(f"{rate:g}" for rate in RATES)
    least = "none that is finite" if math.isinf(own.loss) else f"{own.loss:.2f} nats a label"
    told = (f"One batch of {UTTERANCES} utterances is not learned in {steps} steps of AdamW at {rates}: {least}, where a model "
            f"that does not listen has {level:.2f}.")
    if helps:
        told += (f" With a plain one in place of {' or of '.join(NAMES[name] for name in helps)} it is, after "
                 f"{min(tried[name].steps for name in helps)} steps.")
    else:
        told += f" Plain parts throughout learn it in {plain.steps} steps; no single exchange does."
    evidence = {"plain parts that hear nothing": round(level, 3), "as it is": _short(own),
                "plain parts throughout": _short(plain),
                **{f"plain in place of {NAMES[name]}": _short(trial) for name, trial in tried.items()}}
    # On the plateau it may be slow; whoever does not come down to it has not even learned how often letters are.
    return Finding(
        "batch-not-learned", "prevents" if helps and own.loss > ABOVE * level else "warning", told,
        f"What keeps it from learning lies in {' or '.join(NAMES[name] for name in helps)}, not in data, optimizer or "
        "schedule." if helps else "More than one part keeps it from learning, or a part needs many more steps than these.",
        evidence, [line for name in helps for line in FIXES[name]] or [
            "python -m tools.doctor check ... --only exchange --seconds 600 for more patience",
            "build it up from plain parts, one at a time, and train one batch after each"],
        0.6 if helps else 0.4, where=helps[0] if len(helps) == 1 else "model")


def _short(trial: Trial) -> str:
    return f"{trial.loss:.2f} after {trial.steps} steps" if math.isfinite(trial.loss) else "not finite"
