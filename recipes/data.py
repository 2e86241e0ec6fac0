"""From manifests to batches: text to targets, training through lhotse, evaluation in order of duration.

A batch is (audio (B, samples) float32, audio lengths (B), targets (B, S), target lengths (B), utterance ids).
With `cache_features` features (B, D, T) with lengths in frames stand in place of the audio.
Ids travel with the batch so that whatever goes wrong later can name its utterances. Nothing is dropped in
silence: audio that cannot be read and text that the labels cannot spell stop the run with the utterance's name.
"""

from __future__ import annotations

import copy
import io
import os
import signal
from itertools import islice
from pathlib import Path

import numpy as np
import sentencepiece
import soundfile
import torch
from omegaconf import OmegaConf
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from manifests.schema import read_manifest, resolve_audio
from manifests.shards_format import COMBINED, is_sharded, read_shard, shard_path

Batch = tuple[Tensor, Tensor, Tensor, Tensor, list[str]]

DRAWN_AHEAD = 16  # batches, where a process of its own draws them


class DataError(RuntimeError):
    """An utterance that cannot be used. The message names it."""


class CharEncoder:
    """Text to character targets by the position of each character in `labels`."""

    def __init__(self, labels):
        self.index = {label: position for position, label in enumerate(labels)}

    def __call__(self, text: str) -> list[int]:
        """Targets of a text; raises ValueError naming the characters that are not among the labels."""
        unknown = sorted({character for character in text if character not in self.index})
        if unknown:
            hint = "; lower-case the text" if any(c.lower() in self.index for c in unknown) else ""
            raise ValueError(f"characters {unknown} of {text!r} are not among the labels{hint}")
        return [self.index[character] for character in text]


class SampledPieces:
    """Text to tokens, each merge of the tokenizer left out with probability `dropout`, anew for each text.

    Provilkov et al. 2020 (arXiv 1910.13267): words are met in smaller pieces too, as new words will have to be spelled.
    The draws differ by rank, worker and epoch, and follow torch's seed. Raises ValueError for a tokenizer that is not
    sentencepiece's BPE.
    """

    def __init__(self, tokenizer, dropout: float, rank: int = 0):
        proto = ModelProto()
        processor = getattr(tokenizer, "tokenizer", None)
        if isinstance(processor, sentencepiece.SentencePieceProcessor):
            proto.ParseFromString(processor.serialized_model_proto())
        if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
            raise ValueError(
                f"model.bpe_dropout={dropout} leaves out merges of a sentencepiece tokenizer of type BPE, which this "
                "one is not: set model.bpe_dropout=0"
            )
        self.tokenizer, self.dropout, self.rank = tokenizer, dropout, rank
        self.process: int | None = None

    def __call__(self, text: str) -> list[int]:
        if self.process != os.getpid():  # sentencepiece's generator is the process' own
            self.process = os.getpid()
            sentencepiece.set_random_generator_seed((torch.initial_seed() + self.rank) % 2**32)
        return self.tokenizer.text_to_ids(text, sample_alpha=self.dropout)


def collate(audio: list[np.ndarray | Tensor], targets: list[list[int]], ids: list[str]) -> Batch:
    """Right-padded batch: `audio` holds waveforms (samples) or features (T, D) of an utterance each, on one device."""
    lengths = torch.tensor([len(signal) for signal in audio])
    target_lengths = torch.tensor([len(target) for target in targets])
    parts = [signal if torch.is_tensor(signal) else torch.from_numpy(np.ascontiguousarray(signal)) for signal in audio]
    like = parts[0] if parts else torch.zeros(0)
    signals = torch.zeros(len(parts), max(map(len, parts), default=0), *like.shape[1:], device=like.device)
    targets_BS = torch.zeros(len(targets), max(map(len, targets), default=0), dtype=torch.long)
    for row, (part, target) in enumerate(zip(parts, targets)):
        signals[row, : len(part)] = part
        targets_BS[row, : len(target)] = torch.tensor(target, dtype=torch.long)
    return signals if signals.ndim == 2 else signals.transpose(1, 2), lengths, targets_BS, target_lengths, ids


class FeatureCache:
    """The features of each utterance, computed once and kept in memory in float16: an hour takes 58 MB at 80 bins.

    The preprocessor is a copy in evaluation mode, so without dither: the features are those of evaluation. What an
    epoch changes in them (SpecAugment) comes after it. They are computed and kept where the model is by then: on a GPU
    a batch is put together there, which from the host would take nearly as long as a step of training.
    """

    def __init__(self, preprocessor):
        self.original = preprocessor
        self.preprocessor = copy.deepcopy(preprocessor).eval()
        # NeMo's featurizer holds a wrapped `forward` of its own, which a copy would share with the original: dither,
        # windows and filters would be the original's, on whatever device that has been moved to since.
        vars(getattr(self.preprocessor, "featurizer", self.preprocessor)).pop("forward", None)
        self.features: dict[str, Tensor] = {}

    def __call__(self, key: str, load) -> Tensor:
        """Features (T, D) of the utterance `key`; `load` gives its samples where they are not known yet."""
        if key not in self.features:
            device = next((buffer.device for buffer in self.original.buffers()), torch.device("cpu"))
            self.preprocessor.to(device)
            samples_BT = torch.from_numpy(np.ascontiguousarray(load()))[None].to(device)
            with torch.no_grad():
                features_BDT, lengths = self.preprocessor(
                    input_signal=samples_BT, length=torch.tensor([samples_BT.shape[1]], device=device)
                )
            self.features[key] = features_BDT[0, :, : int(lengths[0])].T.to(torch.float16).contiguous()
        return self.features[key]


class CutsDataset(Dataset):
    """Maps the cuts of one mini-batch, chosen by a lhotse sampler, to a batch; of features where there is a cache.

    `shards` is the manifest of all rows of a folder of shards (manifests/shards_format.py), where the audio is in such.
    """

    def __init__(self, encode, cache: FeatureCache | None = None, shards: str | None = None):
        self.encode = encode
        self.cache = cache
        self.shards = shards

    def __getitem__(self, cuts) -> Batch:
        signals, targets, ids = [], [], []
        for cut in cuts:
            try:
                signals.append(self.cache(cut.id, lambda: self.load(cut)) if self.cache else self.load(cut))
                targets.append(self.encode(" ".join(s.text or "" for s in cut.supervisions)))
            except Exception as error:
                raise DataError(f"utterance {utterance_id(cut)} cannot be trained on: {error}") from error
            ids.append(utterance_id(cut))
        return collate(signals, targets, ids)

    def load(self, cut) -> np.ndarray:
        """Samples of a cut, from its file or from its place in a shard."""
        return mono(with_shard_audio(cut, self.shards) if self.shards else cut)


def with_shard_audio(cut, manifest: str):
    """`cut`, or the sharded parts of a mixed one, with the bytes of its audio file in place of a path."""
    from lhotse import AudioSource
    from lhotse.utils import fastcopy

    if hasattr(cut, "tracks"):
        return fastcopy(
            cut, tracks=[fastcopy(track, cut=with_shard_audio(track.cut, manifest)) for track in cut.tracks]
        )
    row = {**(getattr(cut, "custom", None) or {})}
    if not is_sharded(row) or not cut.has_recording:
        return cut
    row["audio_filepath"] = cut.recording.sources[0].source
    source = AudioSource("memory", cut.recording.sources[0].channels, read_shard(shard_path(row, manifest), row))
    return fastcopy(cut, recording=fastcopy(cut.recording, sources=[source]))


def mono(cut) -> np.ndarray:
    """Samples of a lhotse cut; raises ValueError where there is more than one channel."""
    samples = cut.load_audio()
    if samples.shape[0] != 1:
        raise ValueError(
            f"{samples.shape[0]} channels; make it mono, `python -m manifests.validate --audio` lists all such files"
        )
    return samples[0]


def utterance_id(cut) -> str:
    """The manifest's own utterance id, else the name of the audio file."""
    custom = cut.custom or {}
    if "utterance" in custom:
        return str(custom["utterance"])
    sources = cut.recording.sources if cut.has_recording else []
    return Path(str(sources[0].source)).stem if sources and isinstance(sources[0].source, (str, Path)) else cut.id


class ResumableLoader:
    """A DataLoader over a lhotse sampler that goes on in the middle of an epoch.

    Lightning stores `state_dict()` in each checkpoint and gives it back on resume. Only batches that were
    trained on count (`mark_trained`): workers and Lightning's fetcher run ahead of training. On resume the
    sampler, which is deterministic for a seed and an epoch, is asked again and the trained part is skipped
    without touching audio. `seconds` are those of a batch over all devices: with another one (gradients accumulated
    over more batches since) as much audio is skipped as was trained on, to within a batch.
    """

    def __init__(self, loader: DataLoader, seconds: float = 0.0):
        self.loader = loader
        self.seconds = seconds
        self.sampler = loader.sampler  # Lightning calls its set_epoch
        self.dataset = loader.dataset
        self.batch_size = None
        self.num_workers = loader.num_workers
        self._skip = 0
        self._trained = 0

    def mark_trained(self) -> None:
        """The next batch of this epoch has been trained on."""
        self._trained += 1

    def __iter__(self):
        skip, self._skip = self._skip, 0
        self._trained = skip
        batches = _Rest(self.sampler, skip)
        if self.num_workers and self.sampler.world_size > 1:
            # Each rank draws the batches of all, which takes 40 ms a step with 480 s for each of 8: in a process beside
            # the one that trains. The generator is its own, as a DataLoader takes a number from torch's.
            batches = DataLoader(
                batches,
                batch_size=None,
                num_workers=1,
                prefetch_factor=DRAWN_AHEAD,
                worker_init_fn=_outlive_sigterm,
                generator=torch.Generator(),
            )
        # The DataLoader would start the sampler anew: hand it what is left of this epoch instead.
        yield from DataLoader(
            self.dataset,
            sampler=batches,
            batch_size=None,
            num_workers=self.loader.num_workers,
            pin_memory=self.loader.pin_memory,
            prefetch_factor=self.loader.prefetch_factor,
            worker_init_fn=_outlive_sigterm,
        )

    def state_dict(self) -> dict:
        return {"epoch": self.sampler.epoch, "batches": self._trained, "seconds": self.seconds}

    def load_state_dict(self, state: dict) -> None:
        self.sampler.set_epoch(state["epoch"])
        then = state.get("seconds")  # checkpoints of before this was kept have none
        scale = then / self.seconds if then and self.seconds else 1.0
        self._skip = self._trained = round(state["batches"] * scale)


def _outlive_sigterm(worker: int) -> None:
    """A cluster sends SIGTERM to every process, a terminal SIGINT: the training process must not lose its workers before
    it has saved."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class _Rest(IterableDataset):
    """What is left of a sampler's epoch behind its first `skip` batches."""

    def __init__(self, sampler, skip: int):
        self.sampler, self.skip = sampler, skip

    def __iter__(self):
        return islice(iter(self.sampler), self.skip, None)


def lhotse_loader(config, encode, rank: int, world_size: int, preprocessor=None) -> ResumableLoader | DataLoader:
    """Training batches by NeMo's lhotse configuration (`use_lhotse: true`): duration buckets, DDP sharding.

    `cache_features: true` is our addition to it: features by `preprocessor`, computed once (FeatureCache). The cache
    is in this process, so there are no workers then; what is left for them to do is copying.

    Shards are read at random where `manifest_filepath` is their tarred_audio_manifest.json: all is then as with single
    files. With `tarred_audio_filepaths` (or `shar_path`) they come as an endless stream in the workers, for storage
    that cannot be read at any place; there the plain loader is returned, and a resumed run begins its stream anew.
    """
    from nemo.collections.common.data.lhotse import get_lhotse_dataloader_from_config

    from recipes.cuts import read_manifests_with_ours

    read_manifests_with_ours()
    config = OmegaConf.create(config)
    cache = FeatureCache(preprocessor) if config.pop("cache_features", False) else None
    if cache is not None:  # features lie in this process, and on the model's device
        config.num_workers, config.pin_memory = 0, False
    manifest, stream = config.get("manifest_filepath"), config.get("tarred_audio_filepaths") or config.get("shar_path")
    if not isinstance(manifest, str) and manifest and not stream:
        if len(manifest) == 1:
            config.manifest_filepath = manifest = manifest[0]
        else:
            config.force_finite = True  # else NeMo repeats each of them without end, and no epoch does
    at_random = isinstance(manifest, str) and Path(manifest).name == COMBINED and not stream
    dataset = CutsDataset(encode, cache, manifest if at_random else None)
    loader = get_lhotse_dataloader_from_config(config, global_rank=rank, world_size=world_size, dataset=dataset)
    if isinstance(loader.dataset, torch.utils.data.IterableDataset):
        return loader
    return ResumableLoader(loader, float(config.batch_duration or 0) * world_size)


class ManifestBatches(Dataset):
    """The utterances of a manifest in batches of similar duration, longest first; each exactly once.

    `rows` are manifest objects with resolved audio paths; item i is the batch of the rows `groups[i]`.
    """

    def __init__(self, rows: list[dict], sample_rate: int, encode=None, batch_seconds: float = 240.0,
                 max_utterances: int = 128, rank: int = 0, world_size: int = 1, cache: FeatureCache | None = None):
        self.rows = rows
        self.sample_rate = sample_rate
        self.encode = encode
        self.cache = cache
        order = sorted(range(len(rows)), key=lambda i: (-rows[i]["duration"], i))[rank::world_size]
        self.groups: list[list[int]] = []
        for i in order:
            # The first of a group is its longest: padded seconds are its duration times the group's size.
            group = self.groups[-1] if self.groups else None
            if group and len(group) < max_utterances and rows[group[0]]["duration"] * (len(group) + 1) <= batch_seconds:
                group.append(i)
            else:
                self.groups.append([i])

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int):
        """(batch, positions in `rows`)."""
        audio, targets, ids = [], [], []
        for i in self.groups[index]:
            row = self.rows[i]
            ids.append(str(row.get("utterance") or Path(row["audio_filepath"]).stem))
            audio.append(self.cache(str(i), lambda: self.load(row)) if self.cache else self.load(row))
            try:
                targets.append(self.encode(row["text"]) if self.encode else [])
            except ValueError as error:
                raise DataError(f"utterance {ids[-1]} cannot be validated on: {error}") from error
        return collate(audio, targets, ids), self.groups[index]

    def load(self, row: dict) -> np.ndarray:
        """Samples of a row, silence behind them up to two frames of 10 ms: NeMo refuses to normalise one on a GPU."""
        samples = read_audio(row, self.sample_rate)
        return np.pad(samples, (0, max(self.sample_rate // 50 - len(samples), 0)))


def read_audio(row: dict, sample_rate: int) -> np.ndarray:
    """Mono float32 samples of a manifest row, honouring `offset`; other rates are resampled.

    Raises DataError naming the file where it cannot be read, is empty or has several channels.
    """
    path = row["audio_filepath"]
    try:
        with soundfile.SoundFile(io.BytesIO(read_shard(path, row)) if is_sharded(row) else path) as file:
            rate = file.samplerate
            file.seek(round(row.get("offset", 0) * rate))
            frames = int(round(row["duration"] * rate)) if "offset" in row else -1  # the first segment is at 0
            samples = file.read(frames, dtype="float32", always_2d=True)
    except Exception as error:  # soundfile raises several unrelated kinds
        raise DataError(f"{path}: audio cannot be read ({error})") from error
    if samples.shape[1] != 1:
        raise DataError(f"{path}: {samples.shape[1]} channels; make it mono first")
    if len(samples) == 0:
        raise DataError(f"{path}: no samples")
    samples = samples[:, 0]
    if rate != sample_rate:
        import soxr

        samples = soxr.resample(samples, rate, sample_rate)
    return samples


def read_rows(manifests) -> list[dict]:
    """Rows of one or several manifests (path, or list of paths) with audio paths resolved."""
    if isinstance(manifests, (str, Path)):
        manifests = [manifests]
    return [
        {**row, "audio_filepath": str(resolve_audio(row, path))} for path in manifests for row in read_manifest(path)
    ]


def manifest_loader(rows: list[dict], sample_rate: int, encode=None, batch_seconds: float = 240.0,
                    num_workers: int = 0, rank: int = 0, world_size: int = 1,
                    cache: FeatureCache | None = None) -> DataLoader:
    """Loader over ManifestBatches: yields (batch, positions in `rows`), as many batches on each rank.

    Those that a rank lacks are empty: at each one DistributedDataParallel waits for all ranks.
    """
    ranks = [ManifestBatches(rows, sample_rate, encode, batch_seconds, rank=r, world_size=world_size, cache=cache)
             for r in range(world_size)]
    dataset = ranks[rank]
    dataset.groups += [[]] * (max(map(len, ranks)) - len(dataset))
    return DataLoader(dataset, batch_size=None, num_workers=0 if cache else num_workers)
