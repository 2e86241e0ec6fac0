"""The report of a run from its folder alone."""

import json

import pytest

from tools.report.__main__ import commit, error_table, main, report
from tools.report.curve import draw, read_curve
from tools.report.results import ROOT, page

HEADER = ("step,seconds,loss,loss_per_char,blank_rate,learning_rate,grad_norm,audio_seconds_per_second,memory_mb,"
          "val_loss,val_wer,val_cer,val_blank_rate\n")
CURVE = HEADER + ("10,2.5,3.1,3.1,0.9,0.001,2.0,80,900,,,,\n20,5.0,2.5,2.5,0.5,0.002,1.5,82,900,,,,\n"
                  "20,6.0,,,,,,,,2.4,0.8,0.3,0.4\n")
HOW = {"decoding": "greedy CTC", "normalisation": "lower case", "interval": "bootstrap"}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "deepspeech2_mini"
    (folder / "evaluation").mkdir(parents=True)
    (folder / "check").mkdir()
    (folder / "curve.csv").write_text(CURVE)
    predictions = folder / "evaluation" / "predictions_test.json"
    rows = [{"audio_filepath": "a.flac", "duration": 1.0, "text": "a b", "pred_text": "a c"}]
    predictions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    part = {"utterances": 1, "wer": 0.5, "cer": 1 / 3, "wer_interval": [0.5, 0.5],
            "words": {"substitutions": 1, "deletions": 0, "insertions": 0, "reference": 2}}
    metrics = {"manifests": [{"name": "test", "predictions": str(predictions), **part}], "overall": part}
    (folder / "evaluation" / "metrics.json").write_text(json.dumps(metrics))
    (folder / "check" / "one_batch.json").write_text(json.dumps({"batch": {"utterances": 8, "step": 50}}))
    return folder


def test_published_results_name_command_and_hardware_and_no_path(run, tmp_path, capsys):
    (run / "config.yaml").write_text("name: conformer_bpe\ncorpus: {name: mini}\n")
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    metrics |= {"parameters": 2_000_000, **HOW}
    (run / "evaluation" / "metrics.json").write_text(json.dumps(metrics))
    kept = tmp_path / "recipes" / "conformer_bpe" / "results"
    assert main([str(run), "--publish", str(kept), "--command", "./run.sh"]) == 0
    assert {path.name for path in kept.iterdir()} == {"mini.csv", "mini.png", "mini.json"}
    text = (kept / "mini.json").read_text()
    assert str(tmp_path) not in text
    result = json.loads(text)
    assert result["command"] == "./run.sh" and "cores of" in result["hardware"] and result["overall"]["wer"] == 0.5
    with pytest.raises(SystemExit):
        main([str(run), "--publish", str(kept)])

    beside = tmp_path / "recipes" / "conformer" / "results"  # BPE and characters share a folder
    assert main([str(run), "--publish", str(beside), "--command", "./run.sh --model conformer_bpe"]) == 0
    assert {path.name for path in beside.iterdir()} == {f"conformer_bpe_mini{s}" for s in (".csv", ".png", ".json")}
    text = page(tmp_path)
    assert "## mini" in text and "recipes/conformer/results/conformer_bpe_mini.png" in text
    for words in ("| test | 1 | 50.0 (50.0 to 50.0) | 33.3 |", "2.0 M | 20 | 0.1 min",
                  "`./run.sh --model conformer_bpe`"):
        assert words in text


def test_a_run_that_came_home_from_a_node_is_told_as_it_was_trained_there(run, tmp_path):
    (run / "config.yaml").write_text("name: deepspeech2\ncorpus: {name: librispeech_8h}\n")
    (run / "offline").mkdir()
    (run / "offline" / "plan.json").write_text(json.dumps({"commit": "308a08974ef6", "hardware": "NVIDIA H100"}))
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    metrics |= {"parameters": 1, **HOW}
    metrics["manifests"][0]["predictions"] = "/node/exp/deepspeech2_mini/evaluation/predictions_test.json"
    (run / "evaluation" / "metrics.json").write_text(json.dumps(metrics))
    (run / ".deepspeech2.nemo").write_bytes(b"half")
    assert main([str(run), "--publish", str(tmp_path / "results"), "--command", "all"]) == 0
    text = (run / "report.md").read_text()
    assert "reference   a b" in text and ".deepspeech2.nemo" not in text
    [path] = (tmp_path / "results").glob("*.json")
    kept = json.loads(path.read_text())
    assert (kept["commit"], kept["hardware"]) == ("308a089", "NVIDIA H100")


def test_the_results_page_is_that_of_the_published_runs():
    assert (ROOT / "RESULTS.md").read_text() == page(), "run python -m tools.report.results"


def test_report_holds_table_transcripts_and_what_was_trained(run, capsys):
    assert main([str(run)]) == 0
    text = (run / "report.md").read_text()
    for words in ("| test | 1 | 50.00 | 50.00 to 50.00 | 33.33 | 1 | 0 | 0 | 2 |", "reference   a b", "hypothesis  a c",
                  "Trained 20 steps", "8 utterances was learned by heart in 50 steps"):
        assert words in text
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert str(run / "report.md") in capsys.readouterr().out


CONFIG = "name: deepspeech2\ncorpus: {name: mini, test: [data/mini/test-known.json, data/mini/test-new-words.json]}\n"


@pytest.mark.parametrize("measured, said", [
    (["/else/data/mini/test-known.json", f"{ROOT}/data/mini/test-new-words.json"], ""),
    (["/else/data/mini/test-known.json"], "is not of data/mini/test-new-words.json"),
    (["/data/mini/test-known.json", "/data/mini/test-new-words.json", "/data/mini/dev.json"], "is also of /data/mini/dev.json"),
])
def test_an_evaluation_of_other_manifests_is_not_taken_for_the_runs_own(run, capsys, measured, said):
    (run / "config.yaml").write_text(CONFIG)
    path = run / "evaluation" / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["manifests"] = [{**metrics["manifests"][0], "manifest": manifest} for manifest in measured]
    path.write_text(json.dumps(metrics))
    assert main([str(run)]) == (1 if said else 0)
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == bool(said)
    (run / "offline").mkdir()  # its plan named what to evaluate on
    (run / "offline" / "plan.json").write_text("{\"commit\": \"308a08974ef6\"}")
    assert main([str(run)]) == 0


def test_curve_keeps_each_column_to_its_own_steps(run):
    columns = read_curve(run / "curve.csv")
    assert columns["loss_per_char"] == [(10, 3.1), (20, 2.5)] and columns["val_wer"] == [(20, 0.8)]


def test_a_broken_curve_names_file_and_line(run, capsys):
    (run / "curve.csv").write_text(CURVE.replace("2.5,2.5,0.5", "2.5,oops,0.5"))
    assert main([str(run)]) == 1
    assert "curve.csv:3: loss_per_char is 'oops'" in capsys.readouterr().err


def test_a_folder_without_a_run_is_one_line(tmp_path, capsys):
    for folder, said in ((tmp_path, "no curve.csv: this run has not been trained (./run.sh --stage 4"),
                         (tmp_path / "gone", "there is no such folder")):
        assert main([str(folder)]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"report: {folder}: {said}" in error


def test_a_manifest_without_text_has_no_row():
    part = {"name": "x", "words": None}
    assert len(error_table({"manifests": [part], "overall": part})) == 2


def test_several_runs_share_a_picture(run, tmp_path):
    draw({"one": run / "curve.csv", "two": run / "curve.csv"}, tmp_path / "both.png")
    assert (tmp_path / "both.png").stat().st_size > 10_000


def test_the_commit_is_the_one_that_trained(tmp_path):
    note = tmp_path / "git-info.log"
    note.write_text("commit hash: c005aadfb5e3e3e9f270f08e91577ba910f274fe\n")
    assert commit(tmp_path) == "c005aad"
    note.write_text(note.read_text() + "diff --git a/recipes/x.py b/recipes/x.py\n+changed\n")
    assert commit(tmp_path) == "c005aad+"


@pytest.mark.parametrize("model, what", [("labels: [a]", "character"), ("tokenizer: {dir: x}", "token")])
def test_losses_of_a_model_over_tokens_are_a_token(run, model, what):
    (run / "config.yaml").write_text(f"name: conformer_bpe\ncorpus: {{name: mini}}\nmodel:\n  {model}\n")
    assert f"nats a {what}." in report(run).read_text()
