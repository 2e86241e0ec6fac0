"""The FLAC header parser against libsndfile, against the format's bits, and against every way a file can be cut."""

import random
import struct

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manifests.audio import AudioError, read_header
from manifests.flac import FlacError, FlacInfo, crc8, crc16, parse_streaminfo, read_info


# The machine may be busy: how long an example takes says nothing.
RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def make(path, samples=20_000, rate=16000, channels=1, seed=0):
    """A FLAC file of noise: noise, since silence compresses to next to nothing and hides what a cut takes."""
    noise = np.random.default_rng(seed).normal(scale=0.1, size=(samples, channels))
    soundfile.write(path, noise, rate, format="FLAC", subtype="PCM_16")
    return path.read_bytes()


def header(rate=16000, channels=1, bits=16, total=16000, blocks=(4096, 4096), frames=(1000, 6000)) -> bytes:
    packed = rate << 44 | channels - 1 << 41 | bits - 1 << 36 | total
    sizes = struct.pack(">HH", *blocks) + frames[0].to_bytes(3, "big") + frames[1].to_bytes(3, "big")
    return b"fLaC\x80\0\0\x22" + sizes + packed.to_bytes(8, "big") + bytes(16)


@RELAXED
@given(
    rate=st.integers(1, 2**20 - 1),
    channels=st.integers(1, 8),
    bits=st.integers(4, 32),
    total=st.integers(0, 2**36 - 1),
    block=st.integers(16, 2**16 - 1),
    frames=st.tuples(st.integers(0, 2**24 - 1), st.integers(0, 2**24 - 1)),
)
def test_every_field_of_streaminfo_is_read(rate, channels, bits, total, block, frames):
    info = parse_streaminfo(header(rate, channels, bits, total, (block, block), frames))
    assert info == FlacInfo(rate, channels, bits, total, block, block, *frames)


@RELAXED
@given(st.binary(max_size=64) | st.binary(max_size=64).map(lambda tail: b"fLaC\0\0\0\x22" + tail))
def test_any_bytes_give_a_usable_header_or_a_flac_error(tmp_path_factory, raw):
    try:
        info = parse_streaminfo(raw)
    except FlacError as error:
        assert "\n" not in str(error)
    else:
        assert info.sampling_rate > 0 and 1 <= info.channels <= 8 and info.max_block >= 16
    path = tmp_path_factory.mktemp("any") / "x.flac"
    path.write_bytes(raw)
    # Some bytes by chance hold no frame with the right number and checksums, so that none of these is a whole file.
    with pytest.raises(FlacError):
        read_info(path, crc=True)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "is empty (0 bytes)"),
        (b"RIFF1234WAVE", "a WAV file"),
        (b"<html><body>404", "a web page"),
        (bytes(42), "zeros"),
        (header()[:30], "cut off within its header (30 of 42 bytes)"),
        (b"fLaC\x04" + header()[5:], "first block is of type 4"),
        (header(rate=0), "sampling rate 0"),
        (header(blocks=(4096, 15)), "blocks of 4096 to 15"),
        (header(total=409600), "is cut off: 42 bytes, where 409600 samples take 100042 or more"),
    ],
)
def test_broken_headers_are_told_apart(tmp_path, raw, words):
    path = tmp_path / "x.flac"
    path.write_bytes(raw)
    with pytest.raises(FlacError) as caught:
        read_info(path)
    assert words in str(caught.value)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 96000, 12345])
@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("samples", [1, 16, 191, 4096, 4097, 70_000, 600_000])
def test_it_agrees_with_libsndfile_and_finds_the_end(tmp_path, rate, channels, samples):
    path = tmp_path / "x.flac"
    make(path, samples, rate, channels)
    for info in (read_info(path), read_info(path, whole=True), read_info(path, crc=True)):
        assert (info.sampling_rate, info.channels, info.bits, info.total_samples) == (rate, channels, 16, samples)


def test_it_agrees_with_libsndfile_on_real_speech(librispeech_sample):
    paths = sorted(librispeech_sample.glob("*/*/*/*.flac"))
    assert len(paths) == 83
    for path in paths:
        info, expected = read_info(path, whole=True, crc=True), soundfile.info(path)
        assert info.total_samples == expected.frames
        assert info.sampling_rate == expected.samplerate == 16000
        assert info.channels == expected.channels == 1


def check_cuts(path, raw: bytes, cuts) -> None:
    missed = 0
    for cut in cuts:
        path.write_bytes(raw[:cut])
        with pytest.raises(FlacError):
            read_info(path, crc=True)
        try:
            read_info(path, whole=True)
        except FlacError:
            continue
        # All that the quick look may miss is a cut within the last frame.
        missed += 1
        assert cut > len(raw) - parse_streaminfo(raw).max_frame
    assert missed < len(cuts)


def test_every_cut_is_found(tmp_path):
    raw = make(tmp_path / "x.flac", 9000)
    check_cuts(tmp_path / "cut.flac", raw, range(0, len(raw), 61))


def test_every_cut_of_real_speech_is_found(tmp_path, librispeech_sample):
    chosen = random.Random(0)
    for path in sorted(librispeech_sample.glob("*/*/*/*.flac"))[::9]:
        raw = path.read_bytes()
        check_cuts(tmp_path / "cut.flac", raw, [chosen.randrange(len(raw)) for _ in range(10)] + [len(raw) - 1])


def test_a_changed_last_frame_fails_its_checksum(tmp_path):
    path = tmp_path / "x.flac"
    raw = bytearray(make(path))
    raw[-40] ^= 1
    path.write_bytes(raw)
    read_info(path, whole=True)
    with pytest.raises(FlacError, match="cut off"):
        read_info(path, crc=True)


def without_length(raw: bytes) -> bytes:
    """The file as an encoder writes it to a pipe: no total, no frame sizes."""
    changed = bytearray(raw)
    changed[12:18] = bytes(6)
    changed[21] &= 0xF0
    changed[22:26] = bytes(4)
    return bytes(changed)


@pytest.mark.parametrize("samples", [1, 4096, 70_001])
@pytest.mark.parametrize("tag", [b"", b"TAG" + bytes(125)])
def test_a_missing_length_is_taken_from_the_last_frame(tmp_path, samples, tag):
    path = tmp_path / "x.flac"
    raw = make(path, samples)
    path.write_bytes(without_length(raw) + tag)
    assert parse_streaminfo(path.read_bytes()).total_samples == 0
    assert read_info(path).total_samples == samples
    path.write_bytes(without_length(raw)[:-1])
    with pytest.raises(FlacError, match="no length in its header"):
        read_info(path)


@pytest.mark.parametrize(("flags", "footer"), [(0, b""), (16, b"3DI" + bytes(7))])
@pytest.mark.parametrize("size", [0, 1, 200, 300_000])
def test_an_id3_tag_before_it_is_skipped(tmp_path, flags, footer, size):
    path = tmp_path / "x.flac"
    raw = make(path)
    syncsafe = bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0))
    path.write_bytes(b"ID3\4\0" + bytes([flags]) + syncsafe + bytes(size) + footer + raw)
    assert read_info(path, whole=True).total_samples == 20_000
    path.write_bytes(b"ID3\4\0" + bytes([flags]) + syncsafe + bytes(size))
    with pytest.raises(FlacError):
        read_info(path)


def test_checksums_have_the_published_check_values():
    # CRC-8/SMBUS and CRC-16/UMTS of the nine digits, as in the catalogue of parametrised CRC algorithms.
    assert crc8(b"123456789") == 0xF4
    assert crc16(b"123456789") == 0xFEE8


def test_headers_of_other_formats_come_from_libsndfile(tmp_path):
    tone = np.sin(np.arange(12_345) / 9) * 0.3
    soundfile.write(tmp_path / "a.wav", np.stack([tone, tone], 1), 22050)
    header_wav = read_header(tmp_path / "a.wav")
    assert header_wav == (22050, 2, 12_345)
    assert header_wav.duration == 12_345 / 22050
    make(tmp_path / "a.flac")
    # FLAC by its content, whatever the file is called.
    (tmp_path / "a.flac").rename(tmp_path / "b.audio")
    assert read_header(tmp_path / "b.audio") == (16000, 1, 20_000)


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("a.wav", None, "cannot be read: No such file"),
        ("a.wav", b"", "is empty"),
        ("a.flac", b"", "is empty"),
        ("a.wav", b"hello, I am text", "no audio that libsndfile reads"),
        ("a.flac", b"RIFF", "not FLAC"),
        ("a.flac", header(total=0), "no length in its header"),
    ],
)
def test_what_is_no_audio_is_named(tmp_path, name, raw, words):
    path = tmp_path / name
    if raw is not None:
        path.write_bytes(raw)
    with pytest.raises(AudioError) as caught:
        read_header(path)
    assert str(caught.value).startswith(str(path)) and words in str(caught.value)
    assert "\n" not in str(caught.value)
