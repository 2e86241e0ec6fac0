"""Downloads against a local server that does everything wrong once: cuts, lies, ignores, refuses, shrinks, stalls."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from manifests import download, fetch
from manifests.archives import ARCHIVES, Archive
from manifests.download import download_subset, main
from manifests.fetch import DownloadError, Settings
from tests.manifests.faulty_server import UTTERANCES, Server, corpus

ROOT = Path(__file__).parents[2]


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


def test_a_file_system_without_locks_is_told_and_no_error(server, tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fetch.fcntl, "flock", refuse)
    patience = Patience()
    get(server, tmp_path, patience)
    check_tree(tmp_path)
    warned = [line for line in patience.said if "cannot be locked (No locks available)" in line]
    assert len(warned) == 2 and warned[0].startswith(str(tmp_path / "tiny.tar.gz.part"))


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
