"""Downloads against a local server that does everything wrong once: cuts, lies, ignores, refuses, shrinks, stalls."""

import gzip
import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from manifests import download, fetch
from manifests.archives import ARCHIVES, Archive
from manifests.download import check_member, download_subset, extract, main
from manifests.fetch import DownloadError, Settings

ROOT = Path(__file__).parents[2]
UTTERANCES = 3


def member(name, data=b"", kind=tarfile.REGTYPE, link="") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, len(data), link
    return info, data


def pack(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return raw.getvalue()


def corpus(subset: str = "tiny", count: int = UTTERANCES) -> bytes:
    members = [member("LibriSpeech/SPEAKERS.TXT", b"1 | F | tiny | 1 | A\n")]
    members.append(member(f"LibriSpeech/{subset}/1/2/1-2.trans.txt", b"1-2-0000 A\n"))
    # Random bytes stay the size they are, so that the archive can be cut at many places.
    members += [member(f"LibriSpeech/{subset}/1/2/1-2-{n:04}.flac", os.urandom(40_000)) for n in range(count)]
    return pack(*members)


class Server(http.server.ThreadingHTTPServer):
    """Serves `body` at every path ending in .tar.gz; `script` holds one behaviour for each request, then it behaves."""

    daemon_threads = True
    # Whoever cuts a connection on purpose needs no traceback about it.
    handle_error = lambda self, *_: None  # noqa: E731

    def __init__(self, body: bytes):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body = body
        self.script: list[str] = []
        self.requests: list[tuple[str, str | None, str | None]] = []  # path, Range, If-Range
        self.missing: set[str] = set()
        self.validators = True
        self.patience = threading.Event()  # set at the end, for those who stall

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def ranges(self) -> list[str | None]:
        return [asked for _, asked, _ in self.requests]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        server, body = self.server, self.server.body
        behaviour = server.script.pop(0) if server.script else "good"
        asked = self.headers.get("Range")
        server.requests.append((self.path, asked, self.headers.get("If-Range")))
        self.close_connection = True
        if self.path in server.missing:
            return self.send_error(404)
        if behaviour.isdigit():
            self.send_response(int(behaviour))
            if behaviour == "503":
                self.send_header("Retry-After", "7")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if behaviour == "wrong bytes":
            body = bytes(len(body))
        if behaviour == "page":
            body = b"<html>Please log in</html>"
        etag = f'"{hashlib.md5(body).hexdigest()}"' if server.validators else None
        start, status = 0, 200
        if asked and behaviour != "ignore range" and self.headers.get("If-Range") in (None, etag):
            start, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
        if behaviour == "other range" and asked:
            start = start // 2
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if etag:
            self.send_header("ETag", etag)
        if behaviour == "no length":
            self.send_header("Connection", "close")
        else:
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        left = body[start:]
        if behaviour == "cut":
            left = left[: len(left) // 2]
        if behaviour == "cut at once":
            left = b""
        if behaviour in ("stall", "hang"):
            self.wfile.write(left[: 1000 if behaviour == "stall" else len(left) // 2])
            self.wfile.flush()
            self.server.patience.wait(2 if behaviour == "stall" else 60)
            return
        if behaviour == "reset":
            self.wfile.write(left[:5000])
            self.wfile.flush()
            # An abrupt end (RST) instead of a polite one (FIN).
            self.connection.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")
            return
        self.wfile.write(left)


@pytest.fixture
def server(monkeypatch):
    body = corpus()
    monkeypatch.setitem(ARCHIVES, "tiny", Archive(12, hashlib.md5(body).hexdigest(), UTTERANCES))
    with Server(body) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield running
        running.patience.set()
        running.shutdown()
        thread.join()


class Patience(Settings):
    """Settings that keep what was said and how long was waited instead of printing and waiting."""

    def __init__(self, **changes):
        self.said: list[str] = []
        self.waits: list[float] = []
        super().__init__(progress=False, say=self.said.append, sleep=self.waits.append, **changes)


def get(server, dest, patience=None, **kwargs):
    return download_subset(dest, "tiny", server.url, settings=patience or Patience(), **kwargs)


def check_tree(dest: Path) -> None:
    """The whole tree, its marker, and nothing else."""
    files = sorted(str(path.relative_to(dest)) for path in dest.rglob("*") if path.is_file())
    chapter = "LibriSpeech/tiny/1/2"
    assert files == [
        "LibriSpeech/SPEAKERS.TXT",
        "LibriSpeech/tiny/.completed",
        *(f"{chapter}/1-2-{number:04}.flac" for number in range(UTTERANCES)),
        f"{chapter}/1-2.trans.txt",
    ]
    assert {(dest / chapter / f"1-2-{number:04}.flac").stat().st_size for number in range(UTTERANCES)} == {40_000}
    assert json.loads((dest / "LibriSpeech/tiny/.completed").read_text())["md5"] == ARCHIVES["tiny"].md5


def test_the_table_is_that_of_openslr():
    assert len(ARCHIVES) == 9
    assert download.archive_urls("train-clean-5") == ["https://www.openslr.org/resources/31/train-clean-5.tar.gz"]
    assert download.archive_urls("test-other") == ["https://www.openslr.org/resources/12/test-other.tar.gz"]
    assert len({archive.md5 for archive in ARCHIVES.values()}) == 9
    assert all(len(archive.md5) == 32 and int(archive.md5, 16) for archive in ARCHIVES.values())


def test_a_download_is_verified_unpacked_marked_and_not_repeated(server, tmp_path):
    assert get(server, tmp_path) == tmp_path / "LibriSpeech" / "tiny"
    check_tree(tmp_path)
    patience = Patience()
    get(server, tmp_path, patience)
    # The folder itself may be given as well.
    get(server, tmp_path / "LibriSpeech")
    assert len(server.requests) == 1
    assert patience.said == [f"tiny: complete in {tmp_path / 'LibriSpeech' / 'tiny'}"]


@pytest.mark.parametrize("validators", [True, False])
@pytest.mark.parametrize("how", ["cut", "reset", "stall"])
def test_a_cut_connection_is_continued_where_it_was_cut(server, tmp_path, how, validators):
    server.script, server.validators = [how, how], validators
    patience = Patience(timeout=0.3)
    get(server, tmp_path, patience)
    check_tree(tmp_path)
    first, second, third = server.ranges
    assert first is None and 0 < int(second[6:-1]) < int(third[6:-1]) < len(server.body)
    assert all(bool(condition) == validators for _, _, condition in server.requests[1:])
    # Each try brought something, so that the patience starts anew.
    assert patience.waits == [1.0, 1.0]


def test_a_killed_download_is_continued_by_the_next_process(server, tmp_path):
    server.script = ["hang"]
    code = "import sys; from manifests.archives import ARCHIVES, Archive; from manifests.download import main;"
    code += f"ARCHIVES['tiny'] = Archive(*{tuple(ARCHIVES['tiny'])!r}); main(sys.argv[1:])"
    part = tmp_path / "tiny.tar.gz.part"
    command = [sys.executable, "-c", code, str(tmp_path), "--subsets", "tiny", "--mirror", server.url]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        for _ in range(3000):
            if part.exists() and part.stat().st_size > 20_000:
                break
            time.sleep(0.01)
        process.kill()
    have = part.stat().st_size
    assert 0 < have < len(server.body)
    assert not (tmp_path / "LibriSpeech").exists() and not (tmp_path / "tiny.tar.gz").exists()
    get(server, tmp_path)
    assert server.ranges[-1] == f"bytes={have}-"
    check_tree(tmp_path)


@pytest.mark.parametrize("script", [["cut", "ignore range"], ["cut", "other range"], ["cut", "cut", "ignore range"]])
def test_a_server_that_ignores_ranges_gives_the_right_file_too(server, tmp_path, script):
    server.script = script
    get(server, tmp_path)
    check_tree(tmp_path)


@pytest.mark.parametrize("validators", [True, False])
@pytest.mark.parametrize("count", [2, 4, 9])
def test_a_file_that_changed_meanwhile_is_started_anew(server, tmp_path, validators, count):
    server.validators = validators
    new, server.body = server.body, corpus(count=count)
    server.script = ["cut"]
    with pytest.raises(DownloadError, match="connection cut at .* 1 times in a row"):
        get(server, tmp_path, Patience(retries=0))
    # It is longer now, or shorter, or even shorter than what is here of it.
    server.body = new
    assert ((tmp_path / "tiny.tar.gz.part").stat().st_size > len(new)) == (count == 9)
    get(server, tmp_path)
    check_tree(tmp_path)


def test_a_part_without_its_record_is_not_trusted(server, tmp_path):
    (tmp_path / "tiny.tar.gz.part").write_bytes(b"what is this")
    get(server, tmp_path)
    assert server.ranges == [None]
    check_tree(tmp_path)


def test_a_whole_part_needs_no_request(server, tmp_path):
    (tmp_path / "tiny.tar.gz.part").write_bytes(server.body)
    (tmp_path / "tiny.tar.gz.part.json").write_text(json.dumps({"length": len(server.body), "validator": ""}))
    get(server, tmp_path)
    assert server.requests == []
    check_tree(tmp_path)


def test_wrong_bytes_are_thrown_away_and_tried_once_more(server, tmp_path):
    server.script = ["wrong bytes"]
    patience = Patience()
    get(server, tmp_path, patience)
    assert server.ranges == [None, None]
    assert any("MD5 is" in line and "once more" in line for line in patience.said)
    check_tree(tmp_path)


@pytest.mark.parametrize("behaviour", ["wrong bytes", "page"])
def test_wrong_bytes_twice_are_an_error_and_leave_nothing(server, tmp_path, behaviour):
    server.script = [behaviour] * 3
    with pytest.raises(DownloadError, match=r"tiny.tar.gz: MD5 is [0-9a-f]{32}, not [0-9a-f]{32}, twice"):
        get(server, tmp_path)
    assert len(server.requests) == 2
    assert list(tmp_path.iterdir()) == []


def test_busy_servers_are_given_time(server, tmp_path):
    server.script = ["503", "502", "429", "503"]
    patience = Patience()
    get(server, tmp_path, patience)
    # Twice as long each time, and no less than the server's Retry-After of 7 s.
    assert patience.waits == [7.0, 2.0, 4.0, 8.0]
    assert "HTTP 503: trying again in 7 s" in patience.said[1]
    check_tree(tmp_path)


def test_patience_ends(server, tmp_path):
    server.script = ["503"] * 20
    patience = Patience(retries=4)
    with pytest.raises(DownloadError, match="HTTP 503, 5 times in a row: run it again later"):
        get(server, tmp_path, patience)
    assert len(server.requests) == 5
    server.script = ["cut at once"] * 20
    with pytest.raises(DownloadError, match="connection cut at 0 of"):
        get(server, tmp_path, Patience(retries=2))


def test_what_is_not_there_is_not_asked_for_again(server, tmp_path):
    server.missing = {"/tiny.tar.gz", "/12/tiny.tar.gz"}
    patience = Patience()
    with pytest.raises(DownloadError, match="/tiny.tar.gz and http://.*/12/tiny.tar.gz: not there"):
        get(server, tmp_path, patience)
    assert [path for path, _, _ in server.requests] == ["/tiny.tar.gz", "/12/tiny.tar.gz"]
    assert patience.waits == [] and list(tmp_path.iterdir()) == []


def test_a_mirror_may_be_laid_out_as_openslr(server, tmp_path):
    server.missing = {"/tiny.tar.gz"}
    get(server, tmp_path)
    check_tree(tmp_path)


@pytest.mark.parametrize("status", ["401", "403", "204"])
def test_a_refusal_is_final(server, tmp_path, status):
    server.script = [status]
    with pytest.raises(DownloadError, match=f"HTTP {status}"):
        get(server, tmp_path)
    assert len(server.requests) == 1


def test_a_length_need_not_be_announced(server, tmp_path):
    server.script = ["no length"]
    get(server, tmp_path)
    check_tree(tmp_path)


def test_a_dead_server_and_a_bad_mirror_are_named(tmp_path, server):
    with pytest.raises(DownloadError, match="no connection .*3 times in a row"):
        download_subset(tmp_path, "tiny", "http://127.0.0.1:1", settings=Patience(retries=2))
    for mirror in ("ftp://somewhere", "somewhere", "file:///etc"):
        with pytest.raises(DownloadError, match="is no URL to download from"):
            download_subset(tmp_path, "tiny", mirror, settings=Patience())
    with pytest.raises(DownloadError, match="is no URL"):
        download_subset(tmp_path, "tiny", "http://a b", settings=Patience())


def test_unknown_subsets_are_refused_before_anything_is_fetched(server, tmp_path, capsys):
    assert main([str(tmp_path), "--subsets", "tiny", "train-clean-50", "--mirror", server.url]) == 1
    error = capsys.readouterr().err
    assert "no archive 'train-clean-50': did you mean 'train-clean-5'? there are: dev-clean, " in error
    assert server.requests == []


def test_a_full_disk_is_seen_before_it_is_full(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**5))
    with pytest.raises(DownloadError, match="0.00 GB free, 0.00 GB needed .* make room"):
        get(server, tmp_path)
    assert not (tmp_path / "tiny.tar.gz").exists()


def test_an_archive_fetched_by_hand_is_used_or_named(server, tmp_path):
    archive = tmp_path / "tiny.tar.gz"
    archive.write_bytes(server.body)
    get(server, tmp_path, keep_archive=True)
    assert server.requests == [] and archive.exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "tiny.tar.gz").write_bytes(server.body[:-1])
    with pytest.raises(DownloadError, match="tiny.tar.gz: its MD5 is not .*: remove it"):
        get(server, other)


@pytest.mark.parametrize(("count", "words"), [(2, "2 utterances of 3, a part"), (3, "3 utterances")])
@pytest.mark.parametrize("given", [".", "LibriSpeech"])
def test_a_tree_made_by_hand_is_used_as_it_is(server, tmp_path, count, words, given):
    chapter = tmp_path / "LibriSpeech" / "tiny" / "1" / "2"
    chapter.mkdir(parents=True)
    for number in range(count):
        (chapter / f"1-2-{number:04}.flac").touch()
    patience = Patience()
    get(server, tmp_path / given, patience)
    assert server.requests == [] and words in patience.said[0]
    assert ("remove the folder" in patience.said[0]) == (count == 2)
    assert len(list(chapter.iterdir())) == count


def test_an_empty_folder_is_no_tree(server, tmp_path):
    (tmp_path / "LibriSpeech" / "tiny").mkdir(parents=True)
    get(server, tmp_path)
    check_tree(tmp_path)


def test_what_a_killed_unpacking_left_is_removed(server, tmp_path):
    stale = tmp_path / "LibriSpeech" / ".tiny.unpacking.abc" / "LibriSpeech" / "tiny"
    stale.mkdir(parents=True)
    (stale / "half.flac").touch()
    get(server, tmp_path)
    check_tree(tmp_path)


def test_nothing_is_marked_when_unpacking_fails(server, tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHIVES, "tiny", ARCHIVES["tiny"]._replace(utterances=4))
    with pytest.raises(DownloadError, match="holds 3 utterances of tiny, not 4"):
        get(server, tmp_path)
    assert list((tmp_path / "LibriSpeech").iterdir()) == []


def test_two_processes_do_not_write_one_file(server, tmp_path):
    with fetch.locked(tmp_path / "tiny.tar.gz.part", "a+b"):
        with pytest.raises(DownloadError, match="another process is at work on it"):
            get(server, tmp_path)
    get(server, tmp_path)
    check_tree(tmp_path)


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


def test_the_command_line(server, tmp_path, capsys):
    assert main([str(tmp_path), "--subsets", "tiny", "--mirror", server.url]) == 0
    check_tree(tmp_path)
    error = capsys.readouterr().err
    assert "tiny: downloading" in error and "100%" in error and f"{UTTERANCES} utterances" in error


def test_help_lists_the_subsets_and_imports_nothing_heavy():
    code = "import sys; from manifests.download import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'numpy', 'soundfile', 'nemo', 'lhotse'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert all(subset in done.stdout for subset in ARCHIVES)
