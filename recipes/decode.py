"""From a saved model and manifest rows to hypotheses: loading, evaluation mode, greedy CTC decoding in parallel.

Works for any NeMo model with a CTC head: characters, BPE, and the CTC branch of hybrid models.

On a CPU several batches are decoded at once, one thread each: the steps of a recurrent layer, and the many
small operations of a small model, gain little from several threads inside one operation. On a GPU one batch is
decoded while threads read the next ones.

Shapes: B batch, T samples, T' output frames, V labels (blank is index V).
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from recipes.data import ManifestBatches, read_audio
from recipes.gpu import out_of_memory, without_kernels
from recipes.options import PRECISIONS, known
# Seconds of padded audio in a batch. On a CPU there is a batch for each core; larger ones only leave its cache.
BATCH_SECONDS = {"cpu": 120.0, "cuda": 960.0}
MIN_BATCH_SAMPLES = 4000  # encoders stumble over batches of a few frames: these are padded, lengths stay


class ModelError(RuntimeError):
    """A model that cannot be loaded, has no CTC head, or needs more memory than there is. The message is one line."""


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is a GPU where there is one that this torch has kernels for.

    Raises ModelError for a device that is not there or cannot be used.
    """
    if name == "auto":
        why = without_kernels(0) if torch.cuda.is_available() else ""
        if why:
            print(f"the CPU is used: torch {torch.__version__} {why}", file=sys.stderr)
        return torch.device("cuda" if torch.cuda.is_available() and not why else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"device={name}: {str(error).splitlines()[0]}; use auto, cpu or cuda") from None
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise ModelError(f"device={name}: {torch.cuda.device_count()} CUDA devices here; use device=auto or device=cpu")
    if device.type == "cuda" and (why := without_kernels(device.index or 0)):
        raise ModelError(f"device={name}: torch {torch.__version__} {why}; device=cpu does without")
    return device


def load_model(path, device="auto"):
    """The NeMo model of a `.nemo` or a Lightning `.ckpt`, in evaluation mode on `device`.

    A checkpoint is a pickle, which can run code: load only your own. Raises ModelError in one line.
    """
    from nemo.collections.asr.models import ASRModel
    from nemo.core.classes.common import import_class_by_path

    from recipes.quiet import quiet_nemo

    quiet_nemo()
    path = Path(path)
    device = pick_device(device) if isinstance(device, str) else device
    try:
        if path.suffix == ".ckpt":
            saved = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
            target = (saved.get("hyper_parameters") or {}).get("cfg", {}).get("target")
            if not target:
                raise ModelError(f"{path}: the checkpoint holds no model configuration; give the run's .nemo instead")
            model = import_class_by_path(target).load_from_checkpoint(path, map_location=device, weights_only=False)
        else:
            model = ASRModel.restore_from(str(path), map_location=device)
    except ModelError:
        raise
    except Exception as error:  # tarfile, pickle, hydra, torch: each has kinds of its own
        reason = f"{type(error).__name__}: {_one_line(error)}"
        raise ModelError(f"{path}: cannot be loaded as a NeMo model ({reason})") from error
    ctc_head(model)
    return model.to(device).eval()


def ctc_head(model):
    """(decoder, decoding) of the model's CTC branch. Raises ModelError where it has none."""
    hybrid = hasattr(model, "ctc_decoder")
    decoder = getattr(model, "ctc_decoder" if hybrid else "decoder", None)
    decoding = getattr(model, "ctc_decoding" if hybrid else "decoding", None)
    if not hasattr(decoding, "ctc_decoder_predictions_tensor"):
        raise ModelError(f"{type(model).__name__} has no CTC head; greedy CTC decoding needs a CTC or a hybrid model")
    return decoder, decoding


def greedy_decoding(model):
    """The model's own decoding where that is greedy, else a greedy one beside it; the model stays as it is."""
    from omegaconf import OmegaConf, open_dict

    decoder, decoding = ctc_head(model)
    if decoding.cfg.strategy == "greedy_batch":
        return decoding
    cfg = OmegaConf.create(OmegaConf.to_container(decoding.cfg))
    with open_dict(cfg):
        cfg.strategy = "greedy_batch"
    if hasattr(decoding, "tokenizer"):
        return type(decoding)(cfg, tokenizer=decoding.tokenizer)
    return type(decoding)(cfg, vocabulary=list(decoder.vocabulary))


def sample_rate_of(model) -> int:
    """Samples a second that the model's features are made from."""
    return int(getattr(model.preprocessor, "_sample_rate", None) or model.cfg.get("sample_rate", 16000))


@contextmanager
def evaluation_mode(model):
    """No dropout, SpecAugment, dither or rounding-up of frames inside; everything as before afterwards."""
    training = [(module, module.training) for module in model.modules()]
    featurizer = getattr(model.preprocessor, "featurizer", None)
    settings = {name: getattr(featurizer, name) for name in ("dither", "pad_to") if hasattr(featurizer, name)}
    model.eval()
    for name in settings:
        setattr(featurizer, name, 0)
    try:
        yield
    finally:
        for name, value in settings.items():
            setattr(featurizer, name, value)
        for module, mode in training:
            module.training = mode


@torch.inference_mode()
def log_probs(model, audio_BT: Tensor, lengths: Tensor, precision: str = "32") -> tuple[Tensor, Tensor]:
    """Waveforms (B, T) with lengths (B) to log-probs (B, T', V+1) with lengths (B); `precision` is one of PRECISIONS."""
    with torch.autocast(audio_BT.device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        output = model.forward(input_signal=audio_BT, input_signal_length=lengths)
        if hasattr(model, "ctc_decoder"):
            encoded_BDT, encoded_lengths = output
            return model.ctc_decoder(encoder_output=encoded_BDT), encoded_lengths
        return output[0], output[1]


class Decoder:
    """Greedy decoding of rows by one model; `texts[i]` is the hypothesis of row i, in the rows' order.

    Args:
        rows: manifest rows with resolved `audio_filepath` and a `duration` in seconds.
        read: (row, sample rate) to mono float32 samples; raises RuntimeError naming the file.
        batch_seconds: padded seconds of audio in a batch; by default `BATCH_SECONDS` of the device, and on a CPU
            less where that would leave cores idle.
        precision: `32`, or `bf16-mixed` for products in bfloat16, as in training: faster where the processor has them,
            and now and then another letter where two are equally likely.
        num_workers: batches at once on a CPU, reading threads beside a GPU; by default torch's threads, or 4.
        on_audio: told the seconds of audio done, after each batch, in this thread.
        on_error: told (row index, error) of audio that cannot be read; without it the first one is raised.

    Raises UsageError, a ValueError, where `precision` is none of these.

    After `run`: `texts` (None where not read), `seconds` (wall), `short` (indices of rows too short to decode),
    `audio_seconds` (of each row, by the samples read: a manifest's durations may be wrong).
    """

    def __init__(self, model, rows: list[dict], *, read: Callable = read_audio, batch_seconds: float | None = None,
                 precision: str = "32", num_workers: int | None = None, on_audio: Callable | None = None,
                 on_error: Callable | None = None):
        known("precision", precision, PRECISIONS)
        self.model, self.rows, self.read, self.precision = model, rows, read, precision
        self.device = next(model.parameters()).device
        self.sample_rate = sample_rate_of(model)
        self.on_cpu = self.device.type == "cpu"
        self.workers = num_workers or (torch.get_num_threads() if self.on_cpu else 4)
        if not batch_seconds:
            batch_seconds = BATCH_SECONDS.get(self.device.type, 120.0)
            if self.on_cpu:  # at least eight batches for each core, so that all end at about the same time
                share = sum(row["duration"] for row in rows) / (8 * self.workers)
                batch_seconds = min(batch_seconds, max(share, 20.0))
        self.groups = ManifestBatches(rows, self.sample_rate, batch_seconds=batch_seconds).groups
        self.on_audio = on_audio or (lambda seconds: None)
        self.on_error = on_error
        self.decoding = greedy_decoding(model)
        featurizer = getattr(model.preprocessor, "featurizer", None)
        # Below two feature frames the normalisation of features has no variance.
        self.min_samples = 2 * int(getattr(featurizer, "hop_length", self.sample_rate // 100))
        self.texts: list[str | None] = [None] * len(rows)
        self.short: list[int] = []
        self.audio_seconds = [0.0] * len(rows)
        self.seconds = 0.0
        self._longest = 0
        self._lock = threading.Lock()

    def run(self) -> list[str | None]:
        """Decodes all rows once; returns `texts`.

        A batch that does not fit into the memory is decoded in halves. Raises ModelError for an utterance that does not
        fit alone, AudioError for audio that cannot be read.
        """
        start = perf_counter()
        with evaluation_mode(self.model):
            if self.on_cpu and self.workers > 1 and len(self.groups) > 2:
                self._run_parallel()
            else:
                self._run_in_order()
        self.seconds = perf_counter() - start
        self.short.sort()
        return self.texts

    def _run_in_order(self) -> None:
        with ThreadPoolExecutor(1 if self.on_cpu else self.workers) as pool:
            todo, reading = deque(self.groups), deque()
            try:
                while todo or reading:
                    while todo and len(reading) <= self.workers:
                        group = todo.popleft()
                        reading.append((group, pool.submit(self._read, group)))
                    group, future = reading.popleft()
                    self._decode(*future.result())
                    self._tell(group)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _run_parallel(self) -> None:
        # The longest utterance goes alone: models that grow a buffer with the length (position encodings) do it here.
        (longest, *others), *groups = self.groups
        self._decode(*self._read([longest]))
        self._tell([longest])
        groups = [others, *groups] if others else groups
        threads, late = torch.get_num_threads(), []
        pool = ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,))
        try:
            futures: dict[Future, list[int]] = {
                pool.submit(self._read_and_decode, group): group for group in groups
            }
            for future in as_completed(futures):
                if (batch := future.result()) is not None:
                    late.append((futures[future], batch))
                else:
                    self._tell(futures[future])
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(threads)
        for group, batch in late:
            self._decode(*batch)
            self._tell(group)

    def _tell(self, group: list[int]) -> None:
        self.on_audio(sum(self.rows[i]["duration"] for i in group))

    def _read_and_decode(self, group: list[int]):
        """None when decoded; the batch itself where its audio is longer than any before (its manifest is wrong)."""
        batch = self._read(group)
        if batch[0].shape[1] > self._longest:
            return batch
        return self._decode(*batch)

    def _read(self, group: list[int]) -> tuple[Tensor, Tensor, list[int]]:
        """(audio (B, T), lengths (B), row indices) of what can be read and is long enough."""
        audio, kept = [], []
        for i in group:
            try:
                samples = self.read(self.rows[i], self.sample_rate)
                if not np.isfinite(samples).all():
                    raise RuntimeError(f"{self.rows[i]['audio_filepath']}: holds samples that are not finite")
            except RuntimeError as error:
                if self.on_error is None:
                    raise AudioError(i, error) from error
                self.on_error(i, error)
                continue
            self.audio_seconds[i] = len(samples) / self.sample_rate
            if len(samples) < self.min_samples:
                with self._lock:
                    self.short.append(i)
                self.texts[i] = ""
                continue
            audio.append(samples)
            kept.append(i)
        lengths = torch.tensor([len(samples) for samples in audio], dtype=torch.long)
        audio_BT = torch.zeros(len(audio), max([MIN_BATCH_SAMPLES, *map(len, audio)]))
        for row, samples in enumerate(audio):
            audio_BT[row, : len(samples)] = torch.from_numpy(np.ascontiguousarray(samples))
        return audio_BT, lengths, kept

    def _decode(self, audio_BT: Tensor, lengths: Tensor, kept: list[int]) -> None:
        if not kept:
            return
        self._longest = max(self._longest, audio_BT.shape[1])
        try:
            self._decode_at_once(audio_BT, lengths, kept)
            return
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if len(kept) == 1:
                seconds = int(lengths) / self.sample_rate
                raise ModelError(
                    f"{self.rows[kept[0]]['audio_filepath']}: its {seconds:.0f} s do not fit into the memory of "
                    f"{self.device}: cut it into shorter pieces" + ("" if self.on_cpu else ", or give device=cpu")
                ) from error
        # Not within the except: the error keeps alive what did not fit.
        torch.cuda.empty_cache()
        half = len(kept) // 2
        for part in (slice(None, half), slice(half, None)):
            longest = max(MIN_BATCH_SAMPLES, int(lengths[part].max()))
            self._decode(audio_BT[part, :longest], lengths[part], kept[part])

    def _decode_at_once(self, audio_BT: Tensor, lengths: Tensor, kept: list[int]) -> None:
        log_probs_BTV, encoded_lengths = log_probs(
            self.model, audio_BT.to(self.device), lengths.to(self.device), self.precision
        )
        hypotheses = self.decoding.ctc_decoder_predictions_tensor(
            decoder_outputs=log_probs_BTV, decoder_lengths=encoded_lengths, return_hypotheses=False
        )
        for i, hypothesis in zip(kept, hypotheses):
            self.texts[i] = hypothesis if isinstance(hypothesis, str) else hypothesis.text


class AudioError(RuntimeError):
    """Audio of row `index` that cannot be read."""

    def __init__(self, index: int, error: Exception):
        super().__init__(str(error))
        self.index = index


def _one_line(error: Exception, limit: int = 300) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
