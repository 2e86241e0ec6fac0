"""What a folder of shards holds, and how one utterance is read from it without unpacking anything.

    DIR/audio_0.tar ...                          the audio files as they were, plain tar, not compressed
    DIR/sharded_manifests/manifest_0.json ...    the rows of one tar each, in its order
    DIR/tarred_audio_manifest.json               all rows, in the order of the shards
    DIR/shards.json                              what was sharded, with sizes and SHA-256; written last

The names are those of NeMo's own converter, so NeMo reads the folder as a tarred data set. A row is the source's row
with `audio_filepath` the name inside the tar, and three fields more: `shard_id` (NeMo's), `tar_offset` (byte of the tar
at which the file's bytes begin) and `tar_bytes` (how many). With the latter two any row is one read at a known place.
"""

import hashlib
import os
from functools import lru_cache
from typing import Any, BinaryIO

COMBINED = "tarred_audio_manifest.json"
RECORD = "shards.json"
IN_SHARDS = ("shard_id", "tar_offset", "tar_bytes")  # fields that hold beside the row's own tars only
BLOCK = 512  # of a tar: a header, and what sizes are rounded up to


class ShardError(ValueError):
    """Shards that cannot be written, read or trusted. The message has one line a problem, each with its file."""


def tar_name(shard: int) -> str:
    return f"audio_{shard}.tar"


def manifest_name(shard: int) -> str:
    return os.path.join("sharded_manifests", f"manifest_{shard}.json")


def file_sha256(path: str | os.PathLike) -> str:
    """Of a file's contents, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_sharded(row: dict[str, Any]) -> bool:
    """Whether a manifest row stands for a part of a tar."""
    return "tar_offset" in row


def shard_path(row: dict[str, Any], manifest_path: str | os.PathLike) -> str:
    """`<folder of the manifest>/audio_<shard>.tar/<name in it>`: a sharded row's audio, for `read_shard`."""
    folder = os.path.dirname(os.path.abspath(os.fspath(manifest_path)))
    return os.path.join(folder, tar_name(row["shard_id"]), row["audio_filepath"])


def read_shard(path: str, row: dict[str, Any]) -> bytes:
    """The audio file (FLAC, Opus, WAV, as it was) of a sharded row; `path` as `shard_path` gives it.

    Raises:
        ShardError: no such tar, one cut off, or one in which another file stands at that place.
    """
    tar, name = os.path.split(path)
    offset, size = row["tar_offset"], row["tar_bytes"]
    again = "copy it again, `python -m manifests.shards MANIFEST --out DIR --verify` finds all such"
    try:
        # The header before the file comes along in the same read: it says whether manifest and tar belong together.
        data = os.pread(_open(tar).fileno(), size + BLOCK, offset - BLOCK)
    except OSError as error:
        raise ShardError(f"{tar}: cannot be read ({error.strerror or error}): {again}") from error
    if data[:100].rstrip(b"\0") != name.encode():
        raise ShardError(f"{tar}: {name} is not at byte {offset}: manifest and tar are not of one run: {again}")
    if len(data) < size + BLOCK:
        raise ShardError(f"{tar}: ends within {name}, {size + BLOCK - len(data)} bytes are missing: {again}")
    return data[BLOCK:]


@lru_cache(maxsize=512)  # 960 h are 241 tars
def _open(tar: str) -> BinaryIO:
    # Opening costs a round trip on a file system shared by many nodes. Reads say where, so processes can share it.
    return open(tar, "rb", buffering=0)
