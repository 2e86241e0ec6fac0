"""The benches run, agree on what they count, and are found by name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from manifests.librispeech import build_rows
from tools.bench import __main__ as bench
from tools.bench import manifests
from tools.bench.manifests import OURS, Timing, compare, contenders, make_tree, summarise

ROOT = Path(__file__).parents[2]


def test_the_made_tree_is_a_corpus_of_distinct_files(tmp_path):
    rows = build_rows(tmp_path, make_tree(tmp_path, 90, seconds=0.5))
    assert len(rows) == 90 and len({row["chapter"] for row in rows}) == 3
    contents = {Path(row["audio_filepath"]).read_bytes() for row in rows}
    assert len(contents) == 90
    assert all(0.4 < row["duration"] <= 0.5 and row["text"] for row in rows)


@pytest.mark.filterwarnings("ignore")
def test_all_contenders_see_all_utterances(tmp_path):
    make_tree(tmp_path / "tree", 45, seconds=0.3)
    flacs = sorted(str(path) for path in tmp_path.rglob("*.flac"))
    functions = contenders(tmp_path / "tree", "bench", flacs, tmp_path)
    assert {OURS, "bare FLAC headers", "soundfile.info", "lhotse prepare_librispeech"} <= functions.keys()
    counts = {name: function() for name, function in functions.items() if not name.startswith("sox")}
    assert set(counts.values()) == {45}, counts


def test_turns_rotate_and_the_first_is_not_counted(capsys):
    order = []
    functions = {name: lambda name=name: order.append(name) or 10 for name in (OURS, "b", "c")}
    timings = compare(functions, 2)
    assert "".join(name[0] for name in order) == "cmb" + "mbc" + "bcm"
    assert {name: len(runs) for name, runs in timings.items()} == {OURS: 2, "b": 2, "c": 2}


def test_figures_are_rates_of_cpu_time_in_pairs_of_a_round():
    timings = {OURS: [Timing(100, 2.0, 1.0), Timing(100, 9.0, 2.0)], "b": [Timing(50, 2.0, 2.0), Timing(50, 9.0, 5.0)]}
    figures = summarise(timings)["b"]
    assert (figures["ours_times_faster_min"], figures["ours_times_faster_max"]) == (4.0, 5.0)
    assert figures["cpu_utt_per_s"] == (25 + 10) / 2
    assert summarise(timings)[OURS]["ours_times_faster"] == 1.0


def test_a_short_bench_on_real_speech(librispeech_sample, tmp_path, capsys):
    out = tmp_path / "bench.json"
    args = ["manifests", "--tree", str(librispeech_sample.parent), "--rounds", "1", "--json", str(out)]
    assert bench.main(args) == 0
    shown = capsys.readouterr().out
    assert "55 utterances, 1 rounds" in shown and "lhotse prepare_librispeech" in shown
    saved = json.loads(out.read_text())
    assert saved["utterances"] == 55 and saved["summary"][OURS]["cpu_utt_per_s"] > 0
    page = (tmp_path / "README.md").read_text()
    assert "## bench" in page and f"| {OURS} |" in page and "python -m tools.bench manifests --tree" in page
    assert str(librispeech_sample.parent) not in out.read_text() + page


def test_an_unknown_bench_or_subset_is_named(librispeech_sample, capsys):
    assert bench.main(["manifest"]) == 2
    assert "no bench 'manifest': there are " in capsys.readouterr().err
    assert manifests.main(["--tree", str(librispeech_sample), "--subset", "train-clean-6"]) == 1
    assert "did you mean 'train-clean-5'" in capsys.readouterr().err


def test_help_lists_the_benches():
    command = [sys.executable, "-m", "tools.bench", "--help"]
    done = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True)
    assert "manifests    Manifest building" in done.stdout
