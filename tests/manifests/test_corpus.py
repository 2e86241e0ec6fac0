"""A corpus by its name: what its YAML names is fetched, by way of a server that does everything wrong once."""

import json

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


@pytest.mark.parametrize("writable", [True, False])
def test_the_report_of_a_check_is_saved_beside_no_manifest(librispeech_sample, tiny, tmp_path, capsys, writable):
    (corpus.CONF / "tiny.yaml").write_text(
        "name: tiny\nsource: librispeech\nroot: x\n"
        "splits: {train: {subsets: [train-clean-100]}, dev: {subsets: [train-clean-5]}}\n")
    out = tmp_path / "manifests" / "mine"
    saved = tmp_path / "manifests" / ".stages" / "mine.json"
    if not writable:
        out.parent.mkdir()
        saved.parent.write_text("in the way")
    assert corpus.main(["build", "tiny", "--data", str(librispeech_sample), "--out", str(out), "--check"]) == 0
    told = capsys.readouterr()
    assert sorted(path.name for path in out.iterdir()) == ["dev.json", "train.json"]
    if writable:
        report = json.loads(saved.read_text())
        assert report["ok"] and report["total"]["utterances"] == 83 and report["total"]["vocabulary"]["the"] > 10
        assert str(saved) in told.out and told.err == ""
    else:
        assert told.err.startswith(f"warning: {saved}: the report cannot be saved: ") and told.err.count("\n") == 1


def test_what_cannot_be_fetched_is_one_line(server, tiny, capsys):  # noqa: F811
    server.missing = {"/tiny.tar.gz", "/12/tiny.tar.gz"}
    assert corpus.main(["fetch", "tiny", "--mirror", server.url]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    assert corpus.main(["fetch", "huge"]) == 1
    assert capsys.readouterr().err == "error: no corpus 'huge': there are tiny\n"


@pytest.mark.parametrize("shuffled_over", [5, 12])
def test_a_train_split_larger_than_training_shuffles_over_has_its_subsets_mixed(tmp_path, monkeypatch, tiny, shuffled_over):
    (corpus.CONF / "two.yaml").write_text(
        "name: two\nsource: librispeech\nroot: x\nsplits: {train: {subsets: [a, b]}, dev: {subsets: [a]}}\n")
    made = {name: [{"audio_filepath": f"/{name}{i}.flac", "duration": 1.0, "text": "x", "speaker": "s",
                    "utterance": f"{name}-{i}"} for i in range(6)] for name in "ab"}
    monkeypatch.setattr(corpus, "find_root", lambda root: root)
    monkeypatch.setattr(corpus, "list_subsets", lambda root: ["a", "b"])
    monkeypatch.setattr(corpus, "build_rows", lambda root, subset, ids, workers: list(made[subset]))
    monkeypatch.setattr(corpus, "SHUFFLED_ROWS", shuffled_over)
    train = [row["utterance"] for row in corpus.build("two", tmp_path, tmp_path / "out")["train"]]
    plain = [row["utterance"] for name in "ab" for row in made[name]]
    assert sorted(train) == plain and (train == plain) is (shuffled_over == 12)
    assert train == [row["utterance"] for row in corpus.build("two", tmp_path, tmp_path / "out")["train"]]
    assert {name[0] for name in train[:6]} == ({"a"} if shuffled_over == 12 else {"a", "b"})
