"""A corpus for a bundle: its manifests with relative paths, its audio as FLAC or Opus.

Opus at 24 kbit/s takes about a sixth of FLAC's size and keeps the number of samples, but not the samples. Encoded
files are kept in a work folder, so that an interrupted call goes on; they are made anew when their source is another.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from manifests.schema import ManifestError, read_manifest, resolve_audio, write_manifest
from tools.offline_bundle.parts import BundleError

KINDS = ("flac", "opus")
# libsndfile's compression level from 0 to 1 runs linearly from 256 to 6 kbit/s for a mono Opus file.
MAX_KBITS, MIN_KBITS = 256, 6


class Corpus(NamedTuple):
    """Manifests by split, rows with absolute audio paths; `bytes` of the audio as it lies there, each file once."""

    name: str
    splits: dict[str, list[dict]]
    audio: list[str]
    bytes: int
    seconds: float


def read_corpus(name: str, folder: Path, work: Path) -> Corpus:
    """A corpus from a folder of manifests, or from a native tree of which conf/corpus/<name>.yaml makes them.

    Raises BundleError, and ManifestError for a manifest that cannot be used.
    """
    if not folder.is_dir():
        raise BundleError(f"--corpus {name}={folder}: no such folder")
    manifests = sorted(folder.glob("*.json"))
    if not manifests:
        from manifests.corpus import build
        from manifests.librispeech import CorpusError

        try:
            build(name, folder, work / name)
        except CorpusError as error:
            raise BundleError(f"--corpus {name}={folder}: no manifests (*.json) there, and no tree: {error}") from error
        manifests = sorted((work / name).glob("*.json"))
    splits = {}
    for path in manifests:
        rows = [{**row, "audio_filepath": os.path.abspath(resolve_audio(row, path))} for row in read_manifest(path)]
        for row in rows:
            if not os.path.isfile(row["audio_filepath"]):
                raise ManifestError(f"{path}: no audio file {row['audio_filepath']}: build the manifest again")
        splits[path.stem] = rows
    audio = sorted({row["audio_filepath"] for rows in splits.values() for row in rows})
    seconds = sum(row["duration"] for rows in splits.values() for row in rows)
    return Corpus(name, splits, audio, sum(map(os.path.getsize, audio)), seconds)


def files(corpus: Corpus, kind: str, kbits: int, work: Path, jobs: int = 1) -> Iterator[tuple[str, Path]]:
    """(name in the bundle, file) of all manifests, then of all audio. Encodes what is not of `kind` yet, into `work`.

    Raises BundleError naming the file that cannot be encoded.
    """
    top = os.path.commonpath([os.path.dirname(path) for path in corpus.audio])
    ending = ".flac" if kind == "flac" else ".ogg"  # by its container; lhotse would hand .opus to a slower decoder
    place = {path: "audio/" + os.path.splitext(os.path.relpath(path, top))[0] + ending for path in corpus.audio}
    if len(set(place.values())) < len(place):
        seen: dict[str, str] = {}
        pair = next((seen[to], path) for path, to in place.items() if seen.setdefault(to, path) != path)
        raise BundleError(f"{pair[0]} and {pair[1]} differ only in their ending: rename one")
    encoded = work / "audio" / corpus.name / (kind if kind == "flac" else f"opus{kbits}")
    tasks = [(path, str(encoded / to), kind, kbits) for path, to in place.items()]
    with ProcessPoolExecutor(jobs) as pool:
        results = list(pool.map(encode, tasks, chunksize=16) if jobs > 1 else map(encode, tasks))
    for split, rows in corpus.splits.items():
        path = work / "manifests" / corpus.name / f"{split}.json"
        write_manifest(path, ({**row, "audio_filepath": place[row["audio_filepath"]]} for row in rows))
        yield f"corpora/{corpus.name}/{split}.json", path
    for path, file in zip(corpus.audio, results):
        yield f"corpora/{corpus.name}/{place[path]}", Path(file)


def encode(task: tuple[str, str, str, int]) -> str:
    """(source, target, kind, kbits) to the path of audio of that kind: the source where it is that already."""
    import soundfile

    source, target, kind, kbits = task
    try:
        info = soundfile.info(source)
        if (kind == "flac" and info.format == "FLAC") or (kind == "opus" and info.subtype == "OPUS"):
            return source
        made_of = os.stat(source)
        if _encoded_before(info, made_of, target):
            return target
        dtype = "int16" if kind == "flac" and info.subtype in ("PCM_16", "PCM_S8", "PCM_U8") else "float32"
        samples, rate = soundfile.read(source, dtype=dtype)
        if samples.ndim > 1:
            raise BundleError(f"{source}: {samples.shape[1]} channels: make it mono first")
        os.makedirs(os.path.dirname(target), exist_ok=True)
        part = f"{target}.part"
        if kind == "flac":
            soundfile.write(part, samples, rate, format="FLAC", subtype="PCM_16")
        else:
            level = 1 - (kbits - MIN_KBITS) / (MAX_KBITS - MIN_KBITS)
            soundfile.write(part, samples, rate, format="OGG", subtype="OPUS", compression_level=level)
        frames = soundfile.info(part).frames
        os.utime(part, ns=(made_of.st_atime_ns, made_of.st_mtime_ns))  # by which it is known again
    except (RuntimeError, ValueError, OSError, TypeError) as error:  # soundfile's own are RuntimeErrors
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"{source}: cannot be written as {kind}: {error}") from error
    if frames != len(samples):
        os.unlink(part)
        raise BundleError(f"{source}: {len(samples)} samples, {frames} as {kind} at {rate} Hz: use --audio flac")
    os.replace(part, target)
    return target


def _encoded_before(info, made_of: os.stat_result, target: str) -> bool:
    """Whether `target` was made of this very source (its soundfile.info and os.stat), not of one that lay there before:
    it bears the source's time and has as many samples."""
    import soundfile

    try:
        there = soundfile.info(target)
        same_time = os.stat(target).st_mtime_ns == made_of.st_mtime_ns
    except (RuntimeError, OSError):  # not there, or no audio
        return False
    return same_time and (there.frames, there.samplerate) == (info.frames, info.samplerate)


def parse_corpora(items: list[str]) -> dict[str, Path]:
    """{name: folder} of NAME=FOLDER, or FOLDER alone, whose name is then the corpus's. Raises BundleError."""
    found: dict[str, Path] = {}
    for item in items:
        name, equals, folder = item.partition("=")
        path = Path(folder if equals else item).expanduser()
        name = name if equals else path.resolve().name
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise BundleError(f"--corpus {item}: {name!r} is no name of a corpus: write NAME=FOLDER")
        if name in found:
            raise BundleError(f"--corpus {item}: {name} stands twice")
        found[name] = path
    return found
