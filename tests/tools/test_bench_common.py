"""What the benches share: turns, ratios within pairs, memory, files with their table; and the search for a batch."""

import json
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tools.bench import _common, batch, fresh
from tools.bench._common import (
    BenchError, Cost, fair_clock, guarded, measure, ratios, reset_peak, rss, save, shown, spread, take_turns
)

MACHINE = {"device": "CPU", "cpu": "x", "cores": 2, "threads": 1, "python": "3.11", "versions": {"torch": "2"}}


def test_turns_change_who_goes_first_and_warm_rounds_do_not_count():
    calls = []
    ways = {name: (lambda number, name=name: calls.append((name, number))) for name in "ab"}
    costs = take_turns(ways, 3, warm=1)
    assert [name + str(number) for name, number in calls] == ["b-1", "a-1", "a0", "b0", "b1", "a1", "a2", "b2"]
    assert {name: len(runs) for name, runs in costs.items()} == {"a": 3, "b": 3}


def test_a_cost_has_both_clocks_and_waits_for_the_device():
    order = []
    cost = measure(lambda: order.append("work"), lambda: order.append("wait"))
    assert order == ["wait", "work", "wait"]
    assert cost.wall > 0 and cost.cpu >= 0


def test_ratios_are_taken_within_pairs():
    # a neighbour on the machine doubled the second pair: the ratio does not see it
    found = ratios([Cost(2, 3), Cost(4, 6), Cost(3, 3)], [Cost(1, 1), Cost(2, 2), Cost(1, 1)])
    assert found["wall"]["median"] == 2 and found["wall"]["most"] == 3
    assert found["cpu"] == {"median": 3, "q1": 3, "q3": 3, "least": 3, "most": 3, "count": 3}
    assert shown(spread([1, 2, 3, 4, 5])) == "3.00 (2.00 to 4.00)"
    with pytest.raises(ValueError):
        ratios([Cost(1, 1)], [])
    assert (fair_clock("cpu", 1), fair_clock("cpu", 2), fair_clock("cuda", 1)) == ("cpu", "wall", "wall")


def test_the_peak_of_memory_starts_anew():
    if rss() is None or not reset_peak():
        pytest.skip("this system does not tell or reset a process' peak memory")
    first = bytearray(200 << 20)
    for i in range(0, len(first), 4096):
        first[i] = 1
    assert rss("VmHWM") - rss() < 50 << 20
    del first
    assert rss("VmHWM") - rss() > 150 << 20
    reset_peak()
    assert rss("VmHWM") - rss() < 50 << 20


def test_a_result_names_no_folder_and_its_table_stands_beside_it(tmp_path):
    argv = ["--manifest", "/some/where/train.json", "--corpus=mini", "--json", str(tmp_path / "a.json"), "--note=n",
            "--padding", "mini=/else/where/dev.json"]
    save(tmp_path / "a.json", "conformer", "Title.\n\nmore", argv, MACHINE, ["", "x"], [["small", "1.2"]], "shared",
         cases={"small": 1}, remarks=["What it means."])
    save(tmp_path / "b.json", "loader", "Other.", [], MACHINE, ["", "y"], [["FLAC", "3"]])
    saved = json.loads((tmp_path / "a.json").read_text())
    told = "--manifest train.json --corpus=mini --padding mini=dev.json"
    assert saved["command"] == f"python -m tools.bench conformer {told}"
    assert saved["title"] == "Title." and saved["cases"] == {"small": 1} and saved["commit"] and saved["date"]
    page = (tmp_path / "README.md").read_text()
    assert "| small | 1.2 |" in page and "| FLAC | 3 |" in page and "What it means." in page and "shared" in page
    assert "/some" not in page and str(tmp_path) not in page + (tmp_path / "a.json").read_text()


def test_what_is_not_a_benchs_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("# Benchmarks\n\nOf my own.\n")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "other.json").write_text('{"table": [1, 2]}')
    (tmp_path / "cut.json").write_text('{"bench": ')
    save(tmp_path / "a.json", "loader", "Title.", [], MACHINE, ["", "y"], [["FLAC", "3"]])
    assert (tmp_path / "README.md").read_text() == "# Benchmarks\n\nOf my own.\n"
    (tmp_path / "README.md").unlink()
    for number in "34":  # ours is made anew
        save(tmp_path / "a.json", "loader", "Title.", [], MACHINE, ["", "y"], [["FLAC", number]])
    page = (tmp_path / "README.md").read_text()
    assert "| FLAC | 4 |" in page and page.count("## ") == 1
    assert (_common.RESULTS / "README.md").read_text().startswith(_common.HEAD)


def test_figures_of_a_gpu_do_not_replace_those_of_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(_common, "RESULTS", tmp_path)
    for device in ("CPU", "NVIDIA H100 80GB HBM3"):
        save(None, "batch", "Title.", [], {**MACHINE, "device": device}, ["x"], [["1"]])
    assert {path.name for path in tmp_path.glob("*.json")} == {"batch.json", "batch_nvidia_h100_80gb_hbm3.json"}
    assert "## batch_nvidia_h100_80gb_hbm3\n" in (tmp_path / "README.md").read_text()


LOG = """== environment: .venv with Python 3.11.7, once, some minutes
== stage 0: corpus: conf/corpus/mini.yaml -> data/mini_tree/LibriSpeech
corpus mini: data/mini_tree/LibriSpeech
== stage 0: done in 60 s
== stage 1: manifests: conf/corpus/mini.yaml data/.stages/mini-0 -> data/mini/train.json data/mini/dev.json
== stage 1: done in 15 s
== stage 3: check and one batch: complete, skipped (--force redoes it)
== stage 4: train: data/mini/train.json -> exp/deepspeech2_mini/curve.csv
deepspeech2 on mini: 3.0 M parameters, 1896 steps of 64 s of audio over 1 device(s), outputs in /home/me/exp
step 10/1896  loss 2.9 a character
== stage 4: done in 225 s
Trained 1896 steps in 3 min 20 s, 193 s of audio a second, final loss 0.051 nats a character.
"""


def test_a_log_of_run_sh_says_where_the_seconds_go(tmp_path, capsys):
    (tmp_path / "run.log").write_text(LOG)
    assert fresh.main([str(tmp_path / "run.log"), "--json", str(tmp_path / "fresh.json")]) == 0
    saved = json.loads((tmp_path / "fresh.json").read_text())
    assert saved["table"]["rows"] == [
        ["0", "corpus", "60", "20"], ["1", "manifests", "15", "5"], ["3", "check and one batch", "skipped", ""],
        ["4", "train", "225", "75"], ["", "all", "300", "100"]]
    assert saved["command"] == "python -m tools.bench fresh run.log"
    assert [re.split("[,;]", line)[0] for line in saved["remarks"]] == [
        "deepspeech2 on mini: 3.0 M parameters", "Trained 1896 steps in 3 min 20 s", "The environment was made too"]
    page = (tmp_path / "README.md").read_text()
    assert "| 4 | train | 225 | 75 |" in page and "/home" not in page and "225" in capsys.readouterr().out


@pytest.mark.parametrize("log, words", [
    (LOG.replace("== stage 4: done in 225 s\n", ""), "stage 4 \\(train\\) was not done"),
    (LOG + LOG, "stage 0 \\(corpus\\) stands there twice"),
    ("nothing\n", "give what ./run.sh has printed"),
])
def test_half_a_log_is_not_measured(log, words):
    with pytest.raises(BenchError, match=words):
        fresh.read_log(log)


def test_an_error_is_one_line(capsys):
    def fail():
        raise BenchError("outputs differ")

    assert guarded("conformer", fail) == 1 and guarded("conformer", lambda: None) == 0
    assert capsys.readouterr().err == "bench conformer: outputs differ\n"


def test_the_list_of_benches_needs_neither_torch_nor_nemo():
    code = ("import sys; from tools.bench.__main__ import main; main(['--help']); "
            "sys.exit(sorted({'torch', 'nemo', 'lhotse'} & sys.modules.keys()) or 0)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"  {name} " in done.stdout for name in ("batch", "conformer", "evaluate", "fresh", "loader"))


def memory(bucket, utterances):
    """Bytes of a made-up network with attention: linear in seconds, and a share that grows with the square."""
    return 1000 + utterances * (100 * bucket + 10 * bucket**2)


def limited(limit, told=True):
    tried = []

    def probe(bucket, utterances):
        tried.append((bucket, utterances))
        used = memory(bucket, utterances)
        return batch.Probe(bucket, utterances, used <= limit, used if told else None)

    return probe, tried


@pytest.mark.parametrize("told", [True, False], ids=["peaks known", "only out of memory"])
def test_the_search_finds_the_most_that_fits(told):
    probe, _ = limited(200_000, told)
    most, probes = batch.largest(lambda n: probe(10.0, n), limit=200_000 if told else None)
    assert memory(10.0, most) <= 200_000 < memory(10.0, round(most * 1.06) + 1)
    assert len(probes) < 20


def test_known_peaks_keep_the_tries_near_the_limit():
    probe, tried = limited(200_000)
    batch.largest(lambda n: probe(10.0, n), limit=200_000)
    assert max(memory(*one) for one in tried) < 1.1 * 200_000


def test_the_worst_bucket_is_tried_first_and_binds_all():
    probe, tried = limited(500_000)
    found = batch.search([2.0, 5.0, 20.0], probe, 500_000)
    assert tried[0][0] == 20.0 and set(found["utterances"]) == {2.0, 5.0, 20.0}
    assert all(memory(bucket, count) <= 500_000 for bucket, count in found["utterances"].items())
    assert all(memory(bucket, int(found["seconds"] / bucket)) <= 500_000 for bucket in (2.0, 5.0, 20.0))
    # where the long ones are the worst, no other is searched
    assert sum(bucket != 20.0 for bucket, _ in tried) == 2


def test_a_shorter_bucket_that_is_worse_binds_too():
    def probe(bucket, utterances):  # each utterance costs the same, however short
        return batch.Probe(bucket, utterances, utterances <= 30, None)

    found = batch.search([1.0, 10.0], probe)
    assert found["utterances"] == {10.0: 30, 1.0: pytest.approx(30, abs=1)} and found["seconds"] <= 30


def test_what_cannot_hold_one_utterance_is_refused():
    with pytest.raises(BenchError, match="one utterance of 20 s does not fit"):
        batch.search([5.0, 20.0], lambda bucket, n: batch.Probe(bucket, n, False, None))


def test_buckets_end_with_the_longest_utterance():
    from omegaconf import OmegaConf

    cfg = OmegaConf.create({"model": {"train_ds": {"bucket_duration_bins": [2, 5, 9], "max_duration": 7}}})
    assert batch.buckets_of(cfg) == [2.0, 5.0, 7.0]


def test_each_probe_on_a_cpu_is_a_process_of_its_own(capfd):
    if rss() is None or not reset_peak():
        pytest.skip("this system does not tell or reset a process' peak memory")

    def make():
        def step(bucket, utterances):
            block = bytearray(int(bucket * utterances) << 20)
            block[::4096] = b"1" * len(block[::4096])

        return step

    base = batch.cpu_probe(make, 1 << 50)(10.0, 0).peak  # of such a process that takes nothing
    probe = batch.cpu_probe(make, base + (100 << 20))
    large, small = probe(10.0, 20), probe(10.0, 1)
    assert not large.fits and small.fits
    # 200 MB and 10 MB; the second one does not carry what the first one took
    assert large.peak - small.peak == pytest.approx(190 << 20, rel=0.1)
    with pytest.raises(BenchError, match="1 x 2 s ended without a figure"):
        batch.cpu_probe(lambda: 1 / 0, base)(2.0, 1)
    assert "division by zero" in capfd.readouterr().err
