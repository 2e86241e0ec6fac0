"""FLAC headers read by hand: length, rate and channels from the first 42 bytes of a file, in some microseconds.

The layout is that of RFC 9639: the marker "fLaC", then metadata blocks of which the first is STREAMINFO (section 8.2),
then frames (section 9). Nothing is decoded, and no library is imported.
"""

import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

HEADER_BYTES = 42  # "fLaC", 4 bytes of block header, 34 of STREAMINFO
_STREAMINFO = struct.Struct(">HHBHBHQ")  # after the first 8 bytes; sizes of frames have 24 bits


class FlacError(ValueError):
    """A file that is not a whole FLAC file; the message says how, without naming the file."""


class FlacInfo(NamedTuple):
    """STREAMINFO. Samples are counted per channel; 0 in total_samples, min_frame or max_frame means unknown."""

    sampling_rate: int
    channels: int
    bits: int
    total_samples: int
    min_block: int  # samples in a frame
    max_block: int
    min_frame: int  # bytes in a frame
    max_frame: int


def parse_streaminfo(head: bytes) -> FlacInfo:
    """Parse the first 42 bytes of a FLAC stream.

    Raises:
        FlacError: they are not "fLaC" and a STREAMINFO with a usable rate, channels, and block size.
    """
    if head[:4] != b"fLaC":
        if not head:
            raise FlacError("is empty (0 bytes)")
        raise FlacError(f"is not FLAC: it starts with {bytes(head[:4])!r}{_KINDS.get(bytes(head[:4]), '')}")
    if len(head) < HEADER_BYTES:
        raise FlacError(f"is cut off within its header ({len(head)} of {HEADER_BYTES} bytes)")
    if head[4] & 0x7F or head[5:8] != b"\0\0\x22":
        raise FlacError(f"has no STREAMINFO first: its first block is of type {head[4] & 0x7F}")
    low_block, high_block, low_top, low_rest, high_top, high_rest, packed = _STREAMINFO.unpack_from(head, 8)
    # The last 64 bits: 20 of sampling rate, 3 of channels - 1, 5 of bits - 1, 36 of samples.
    info = FlacInfo(
        packed >> 44,
        (packed >> 41 & 7) + 1,
        (packed >> 36 & 31) + 1,
        packed & 0xFFFFFFFFF,
        low_block,
        high_block,
        low_top << 16 | low_rest,
        high_top << 16 | high_rest,
    )
    if not info.sampling_rate or info.max_block < 16 or info.min_block > info.max_block:
        blocks = f"blocks of {info.min_block} to {info.max_block} samples"
        raise FlacError(f"has a broken STREAMINFO: sampling rate {info.sampling_rate}, {blocks}")
    return info


_KINDS = {
    b"RIFF": " (a WAV file)",
    b"OggS": " (an Ogg file)",
    b"\x1a\x45\xdf\xa3": " (a Matroska or WebM file)",
    b"<htm": " (a web page)",
    b"<!DO": " (a web page)",
    b"vers": " (perhaps a Git LFS pointer: fetch the real file)",
    b"\0\0\0\0": " (zeros: the file was never filled)",
}


def read_info(path: str | os.PathLike, whole: bool = False, crc: bool = False) -> FlacInfo:
    """STREAMINFO of a file; an ID3v2 tag before it is skipped.

    With `whole`, the end of the file must hold the start of the last frame, which finds any truncation but one within
    that frame (a quarter of a second) for some microseconds more; with `crc`, that frame's checksum must be right too,
    which leaves none, at some 0.2 ms a file. Where the header leaves the length out (an encoder that wrote to a pipe),
    total_samples comes from the last frame, checksum and all.

    Raises:
        FlacError: not a FLAC file, or one that is cut off.
        OSError: the file cannot be read.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        head = os.read(handle, HEADER_BYTES)
        start = 0
        if head[:3] == b"ID3" and len(head) >= 10:
            # 10 bytes of header, a size of four times 7 bits, 10 more where bit 4 of the flags announces a footer.
            start = 10 + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]) + (10 if head[5] & 16 else 0)
            head = os.pread(handle, HEADER_BYTES, start)
        info = parse_streaminfo(head)
        size = os.fstat(handle).st_size
        least = start + HEADER_BYTES + -(-info.total_samples // info.max_block) * info.min_frame
        if size < least:
            raise FlacError(f"is cut off: {size} bytes, where {info.total_samples} samples take {least} or more")
        if whole or crc or not info.total_samples:
            # 256 bytes more than a frame, for a tag that players append (ID3v1 has 128).
            length = min(size - start - HEADER_BYTES, (info.max_frame or 1 << 18) + 256)
            tail = os.pread(handle, length, size - length)
            if not info.total_samples:
                info = info._replace(total_samples=_length_by_frames(tail, info))
            elif not any(
                end == info.total_samples and not (crc and not _checksum_fits(tail[at:]))
                for at, end in frames_backwards(tail, info)
            ):
                raise FlacError(f"is cut off: its {size} bytes do not hold all of its {info.total_samples} samples")
    finally:
        os.close(handle)
    return info


def _length_by_frames(tail: bytes, info: FlacInfo) -> int:
    for at, end in frames_backwards(tail, info):
        if _checksum_fits(tail[at:]):
            return end
    raise FlacError("has no length in its header and no whole frame at its end: decode and encode it again")


def frames_backwards(tail: bytes, info: FlacInfo) -> Iterator[tuple[int, int]]:
    """Yield (position in `tail`, samples up to the frame's end) of what looks like a frame's header, from the end.

    A header (RFC 9639, 9.1) is 14 bits of sync code, a bit that says whether frames are numbered or give their first
    sample, codes of block size, rate, channels and bits, that number in UTF-8's coding, and a CRC-8. In 10 kB of coded
    audio one in some thousands of files holds one by chance, so a caller looks for the length or checksum it expects.
    """
    for sync in (b"\xff\xf8", b"\xff\xf9"):  # numbered frames, then frames that give their first sample
        at = len(tail)
        while (at := tail.rfind(sync, 0, at)) >= 0:
            if end := _frame_end(tail[at : at + 16], info):
                yield at, end


def _frame_end(header: bytes, info: FlacInfo) -> int:
    """Samples up to the end of the frame with this header; 0 where it is none."""
    if len(header) < 6:
        return 0
    block_code, rate_code = header[2] >> 4, header[2] & 15
    if not block_code or rate_code == 15 or header[3] >> 4 > 10 or header[3] & 1:
        return 0
    # The number, in 1 to 7 bytes: as many leading ones as bytes (none for a single one), then 6 bits a byte.
    lead = header[4]
    ones = 8 - (lead ^ 0xFF).bit_length()
    if ones == 1 or ones == 8:
        return 0
    number, at = lead & (0x7F >> ones), 5
    for byte in header[5 : 4 + ones]:
        if byte & 0xC0 != 0x80:
            return 0
        number, at = number << 6 | byte & 0x3F, at + 1
    extra = {6: 1, 7: 2}.get(block_code, 0)
    samples = int.from_bytes(header[at : at + extra], "big") + 1 if extra else _BLOCKS[block_code]
    at += extra + {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    if at >= len(header) or crc8(header[:at]) != header[at]:
        return 0
    return (number if header[1] & 1 else number * info.max_block) + samples


# Samples in a frame by their code; 6 and 7 stand for a number at the header's end.
_BLOCKS = [0, 192, 576, 1152, 2304, 4608, 0, 0, *(256 << shift for shift in range(8))]


def _table(bits: int, polynomial: int) -> list[int]:
    table = []
    for value in range(256):
        crc = value << bits - 8
        for _ in range(8):
            crc = (crc << 1) ^ (polynomial if crc >> bits - 1 else 0)
            crc &= (1 << bits) - 1
        table.append(crc)
    return table


_CRC8, _CRC16 = _table(8, 0x07), _table(16, 0x8005)


def crc8(data: bytes) -> int:
    """CRC-8 of a frame header (RFC 9639, 9.1.8): x^8 + x^2 + x + 1, from 0."""
    crc = 0
    for byte in data:
        crc = _CRC8[crc ^ byte]
    return crc


def crc16(data: bytes) -> int:
    """CRC-16 of a frame (RFC 9639, 9.3): x^16 + x^15 + x^2 + 1, from 0; 0 over a frame with its checksum."""
    table, crc = _CRC16, 0
    for byte in data:
        crc = (crc << 8 & 0xFF00) ^ table[crc >> 8 ^ byte]
    return crc


def _checksum_fits(frame: bytes) -> bool:
    # An ID3v1 tag is 128 bytes that start with TAG.
    return crc16(frame) == 0 or (frame[-128:-125] == b"TAG" and crc16(frame[:-128]) == 0)
