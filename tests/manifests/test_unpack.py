"""Archives that reach outside their target, or are none: refused, with nothing written where it must not be."""

import gzip
import os
import tarfile

import pytest

from manifests.download import check_member, extract
from manifests.fetch import DownloadError
from tests.manifests.faulty_server import corpus, member, pack

OUTSIDE = {
    "absolute": member("/tmp/evil", b"x"),
    "dots": member("LibriSpeech/../../evil", b"x"),
    "dots at the end": member("LibriSpeech/..", kind=tarfile.DIRTYPE),
    "backslashes": member("LibriSpeech\\..\\evil", b"x"),
    "symlink out": member("LibriSpeech/a", kind=tarfile.SYMTYPE, link="../.."),
    "symlink in": member("LibriSpeech/a", kind=tarfile.SYMTYPE, link="b"),
    "hard link": member("LibriSpeech/a", kind=tarfile.LNKTYPE, link="/etc/passwd"),
    "fifo": member("LibriSpeech/a", kind=tarfile.FIFOTYPE),
    "device": member("LibriSpeech/a", kind=tarfile.CHRTYPE),
}


@pytest.mark.parametrize("own_filter", [True, False])
@pytest.mark.parametrize("name", OUTSIDE)
def test_archives_that_reach_outside_are_refused(tmp_path, name, own_filter, monkeypatch):
    if not own_filter:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    into = tmp_path / "a" / "b"
    into.mkdir(parents=True)
    archive = tmp_path / "evil.tar.gz"
    archive.write_bytes(pack(member("LibriSpeech/good", b"x"), OUTSIDE[name]))
    with pytest.raises(DownloadError, match="evil.tar.gz: member .* do not use this archive"):
        extract(archive, into)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if not path.is_dir() or path.is_symlink()}
    assert found == {"a/b/LibriSpeech/good", "evil.tar.gz"}


def test_a_link_that_stands_in_the_target_is_not_followed(tmp_path):
    into, outside = tmp_path / "into", tmp_path / "outside"
    into.mkdir()
    outside.mkdir()
    (into / "LibriSpeech").symlink_to(outside)
    with pytest.raises(DownloadError, match="leads outside"):
        check_member(tmp_path / "x.tar.gz", member("LibriSpeech/x", b"x")[0], into)


def test_rights_and_owners_are_not_taken_over(tmp_path):
    info, data = member("LibriSpeech/x", b"x")
    info.mode, info.uid, info.gid = 0o4777, 12345, 12345
    (tmp_path / "x.tar.gz").write_bytes(pack((info, data)))
    extract(tmp_path / "x.tar.gz", tmp_path)
    status = (tmp_path / "LibriSpeech/x").stat()
    assert status.st_mode & 0o7111 == 0 and status.st_uid == os.getuid()


@pytest.mark.parametrize("raw", [b"", b"no archive", gzip.compress(b"no tar" * 200), corpus()[:60_000], corpus()[:30]])
def test_broken_archives_are_named(tmp_path, raw):
    archive = tmp_path / "x.tar.gz"
    archive.write_bytes(raw)
    with pytest.raises(DownloadError, match="x.tar.gz: is no whole .tar.gz"):
        extract(archive, tmp_path / "into")
