"""From manifests to batches: text to targets, training through lhotse, evaluation in order of duration.

A batch is (audio (B, samples) float32, audio lengths (B), targets (B, S), target lengths (B), utterance ids).
Ids travel with the batch so that whatever goes wrong later can name its utterances. Nothing is dropped in
silence: audio that cannot be read and text that the labels cannot spell stop the run with the utterance's name.
"""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from manifests.schema import read_manifest, resolve_audio

Batch = tuple[Tensor, Tensor, Tensor, Tensor, list[str]]


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


def collate(audio: list[np.ndarray], targets: list[list[int]], ids: list[str]) -> Batch:
    """Right-padded batch of waveforms and targets."""
    audio_lengths = torch.tensor([len(samples) for samples in audio])
    target_lengths = torch.tensor([len(target) for target in targets])
    audio_BT = torch.zeros(len(audio), max(map(len, audio), default=0))
    targets_BS = torch.zeros(len(targets), max(map(len, targets), default=0), dtype=torch.long)
    for row, (samples, target) in enumerate(zip(audio, targets)):
        audio_BT[row, : len(samples)] = torch.from_numpy(np.ascontiguousarray(samples))
        targets_BS[row, : len(target)] = torch.tensor(target, dtype=torch.long)
    return audio_BT, audio_lengths, targets_BS, target_lengths, ids


class CutsDataset(Dataset):
    """Maps the cuts of one mini-batch, chosen by a lhotse sampler, to a batch."""

    def __init__(self, encode):
        self.encode = encode

    def __getitem__(self, cuts) -> Batch:
        audio, targets, ids = [], [], []
        for cut in cuts:
            try:
                samples = cut.load_audio()
                targets.append(self.encode(" ".join(s.text or "" for s in cut.supervisions)))
            except Exception as error:
                raise RuntimeError(f"utterance {utterance_id(cut)} cannot be trained on: {error}") from error
            if samples.shape[0] != 1:
                raise RuntimeError(
                    f"utterance {utterance_id(cut)} has {samples.shape[0]} channels; make it mono, "
                    "`python -m manifests.validate --audio` lists all such files"
                )
            audio.append(samples[0])
            ids.append(utterance_id(cut))
        return collate(audio, targets, ids)


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
    without touching audio.
    """

    def __init__(self, loader: DataLoader):
        self.loader = loader
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
        sampler = iter(self.sampler)
        for _ in range(skip):
            if next(sampler, None) is None:
                return
        # The DataLoader would start the sampler anew: hand it what is left of this epoch instead.
        yield from DataLoader(
            self.dataset,
            sampler=_Rest(sampler),
            batch_size=None,
            num_workers=self.loader.num_workers,
            pin_memory=self.loader.pin_memory,
            prefetch_factor=self.loader.prefetch_factor,
            worker_init_fn=_outlive_sigterm,
        )

    def state_dict(self) -> dict:
        return {"epoch": self.sampler.epoch, "batches": self._trained}

    def load_state_dict(self, state: dict) -> None:
        self.sampler.set_epoch(state["epoch"])
        self._skip = self._trained = state["batches"]


def _outlive_sigterm(worker: int) -> None:
    """A cluster sends SIGTERM to every process: the training process must not lose its workers before it has saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class _Rest:
    """What is left of a sampler that has been started."""

    def __init__(self, iterator):
        self.iterator = iterator

    def __iter__(self):
        return self.iterator


def lhotse_loader(config, encode, rank: int, world_size: int) -> ResumableLoader | DataLoader:
    """Training batches by NeMo's lhotse configuration (`use_lhotse: true`): duration buckets, DDP sharding.

    Shards (tarred or Shar) come from an endless stream in the workers; there the plain loader is returned.
    """
    from nemo.collections.common.data.lhotse import get_lhotse_dataloader_from_config

    loader = get_lhotse_dataloader_from_config(
        config, global_rank=rank, world_size=world_size, dataset=CutsDataset(encode)
    )
    return loader if isinstance(loader.dataset, torch.utils.data.IterableDataset) else ResumableLoader(loader)


class ManifestBatches(Dataset):
    """The utterances of a manifest in batches of similar duration, longest first; each exactly once.

    `rows` are manifest objects with resolved audio paths; item i is the batch of the rows `groups[i]`.
    """

    def __init__(self, rows: list[dict], sample_rate: int, encode=None, batch_seconds: float = 240.0,
                 max_utterances: int = 128, rank: int = 0, world_size: int = 1):
        self.rows = rows
        self.sample_rate = sample_rate
        self.encode = encode
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
            audio.append(read_audio(row, self.sample_rate))
            targets.append(self.encode(row["text"]) if self.encode else [])
            ids.append(str(row.get("utterance") or Path(row["audio_filepath"]).stem))
        return collate(audio, targets, ids), self.groups[index]


def read_audio(row: dict, sample_rate: int) -> np.ndarray:
    """Mono float32 samples of a manifest row, honouring `offset`; other rates are resampled.

    Raises RuntimeError naming the file where it cannot be read, is empty or has several channels.
    """
    path = row["audio_filepath"]
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            file.seek(round(row.get("offset", 0) * rate))
            frames = int(round(row["duration"] * rate)) if "offset" in row else -1  # the first segment is at 0
            samples = file.read(frames, dtype="float32", always_2d=True)
    except Exception as error:  # soundfile raises several unrelated kinds
        raise RuntimeError(f"{path}: audio cannot be read ({error})") from error
    if samples.shape[1] != 1:
        raise RuntimeError(f"{path}: {samples.shape[1]} channels; make it mono first")
    if len(samples) == 0:
        raise RuntimeError(f"{path}: no samples")
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
                    num_workers: int = 0, rank: int = 0, world_size: int = 1) -> DataLoader:
    """Loader over ManifestBatches: yields (batch, positions in `rows`)."""
    dataset = ManifestBatches(rows, sample_rate, encode, batch_seconds, rank=rank, world_size=world_size)
    return DataLoader(dataset, batch_size=None, num_workers=num_workers)
