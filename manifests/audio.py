"""The header of any audio file: FLAC by our own parser, the rest by libsndfile."""

import os
from typing import NamedTuple

from manifests.flac import FlacError, read_info


class AudioError(ValueError):
    """An audio file that cannot be read or is not whole; the message is one line and starts with the path."""


class Header(NamedTuple):
    """What a file's header says; `samples` counts per channel."""

    sampling_rate: int
    channels: int
    samples: int

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.samples / self.sampling_rate


def read_header(path: str | os.PathLike) -> Header:
    """Rate, channels and samples of an audio file. FLAC is checked to be whole as well, by its last frame's checksum.

    Raises:
        AudioError: no such file, not audio, cut off, or without a single sample.
    """
    path = os.fspath(path)
    try:
        with open(path, "rb") as file:
            start = file.read(4)
        if start == b"fLaC" or path.lower().endswith(".flac"):
            info = read_info(path, crc=True)
            header = Header(info.sampling_rate, info.channels, info.total_samples)
        elif not start:
            raise AudioError(f"{path}: is empty (0 bytes)")
        else:
            import soundfile  # only here: a tree of FLAC needs it not, and it takes 0.1 s to import

            try:
                found = soundfile.info(path)
            except RuntimeError as error:  # LibsndfileError
                reason = str(error).rpartition(": ")[2]
                message = f"{path}: is no audio that libsndfile reads ({reason}): convert it to FLAC or WAV"
                raise AudioError(message) from error
            header = Header(found.samplerate, found.channels, found.frames)
    except FlacError as error:
        raise AudioError(f"{path}: {error}") from error
    except OSError as error:
        raise AudioError(f"{path}: cannot be read: {error.strerror or error}") from error
    if header.samples <= 0:
        raise AudioError(f"{path}: holds no samples")
    return header
