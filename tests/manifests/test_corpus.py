"""A corpus by its name: what its YAML names is fetched, by way of a server that does everything wrong once."""

import pytest

from manifests import corpus
from tests.manifests.test_download import check_tree, server  # noqa: F401  a fixture


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A corpus of one subset, which the local server has; returns its default place, not made yet."""
    conf = tmp_path / "conf"
    conf.mkdir()
    place = tmp_path / "data" / "LibriSpeech"
    splits = "{train: {subsets: [tiny]}, dev: {subsets: [tiny]}}"
    (conf / "tiny.yaml").write_text(f"name: tiny\nsource: librispeech\nroot: {place}\nsplits: {splits}\n")
    monkeypatch.setattr(corpus, "CONF", conf)
    return place


@pytest.mark.parametrize("named", [False, True])
def test_fetch_downloads_what_the_corpus_needs_once(server, tiny, tmp_path, capsys, named):  # noqa: F811
    server.script = ["wrong bytes"]
    folder = tmp_path / "elsewhere" if named else tiny.parent
    words = ["fetch", "tiny", "--mirror", server.url, *(["--data", str(folder)] if named else [])]
    assert corpus.main(words) == 0
    check_tree(folder)
    assert capsys.readouterr().out.splitlines()[-1] == f"corpus tiny: {folder / 'LibriSpeech'}"
    assert corpus.main(words) == 0 and len(server.requests) == 2  # the wrong bytes and the right ones


def test_a_tree_that_is_there_in_part_is_left_alone(server, tiny, tmp_path, capsys):  # noqa: F811
    (tiny.parent.parent / "conf" / "tiny.yaml").write_text(
        "name: tiny\nsource: librispeech\nroot: data/LibriSpeech\nsplits: {train: {subsets: [tiny, dev-clean]}}\n")
    (tmp_path / "mine" / "tiny").mkdir(parents=True)
    assert corpus.fetch("tiny", tmp_path / "mine", server.url) == tmp_path / "mine"
    assert "existing tree with tiny; not there: dev-clean" in capsys.readouterr().out and server.requests == []


def test_what_cannot_be_fetched_is_one_line(server, tiny, capsys):  # noqa: F811
    server.missing = {"/tiny.tar.gz", "/12/tiny.tar.gz"}
    assert corpus.main(["fetch", "tiny", "--mirror", server.url]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert corpus.main(["fetch", "huge"]) == 1
    assert capsys.readouterr().err == "error: no corpus 'huge': there are tiny\n"
