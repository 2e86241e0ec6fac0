"""Evaluation on manifests: the right numbers and order, files that others read, and one line for what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch

from manifests.schema import ManifestError, read_manifest
from recipes import evaluate
from recipes.decode import ModelError, log_probs
from recipes.evaluate import default_output, evaluate_model, read_sets, report
from recipes.options import PRECISIONS
from recipes.pretrained import FOLDERS, pretrained_path
from tests.conftest import ROOT
from tests.recipes import tiny
from tests.recipes.tiny import RATE, corpus, write_audio, write_rows


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny.nemo"
    model.save_to(str(path))
    return path


@pytest.fixture
def rows(tmp_path):
    return corpus(tmp_path / "audio")


def decode(model, rows, **more):
    from recipes.decode import Decoder

    return Decoder(model, rows, **more).run()


def one_by_one(model, rows) -> list[str]:
    """Hypotheses by NeMo's own calls, an utterance at a time, unpadded, without this project's code."""
    texts = []
    featurizer = model.preprocessor.featurizer
    with torch.inference_mode():
        for row in rows:
            samples, rate = soundfile.read(row["audio_filepath"], dtype="float32")
            assert rate == RATE and not featurizer.training
            signal = torch.from_numpy(samples)[None]
            log_probs, lengths, _ = model.forward(input_signal=signal, input_signal_length=torch.tensor([len(samples)]))
            texts.append(model.decoding.ctc_decoder_predictions_tensor(log_probs, lengths)[0].text)
    return texts


# ---- hypotheses -----------------------------------------------------------------------------------------------------


def test_hypotheses_do_not_depend_on_batches_or_threads_and_keep_the_order(model, rows):
    expected = one_by_one(model, rows)
    assert len(set(expected)) == len(rows) and all(expected)  # each utterance can be told from the others
    for batch_seconds in (0.1, 2.0, 1000.0):
        for workers in (1, 2, 3):
            assert decode(model, rows, batch_seconds=batch_seconds, num_workers=workers) == expected
    assert decode(model, rows[::-1]) == expected[::-1]


def test_bf16_gives_almost_the_same_log_probs_and_says_so(model, rows, tmp_path):
    audio = torch.randn(2, RATE)
    lengths = torch.tensor([RATE, RATE // 2])
    exact, low = (log_probs(model, audio, lengths, precision)[0] for precision in PRECISIONS)
    assert 0 < (exact - low.float()).abs().max() < 0.1
    path = write_rows(tmp_path / "m.json", rows)
    for precision in PRECISIONS:
        assert evaluate_model(model, path, progress=False, precision=precision)["precision"] == precision
    with pytest.raises(ValueError, match="precision=fp16: use one of 32, bf16-mixed"):
        decode(model, rows, precision="fp16")


def test_durations_that_lie_change_no_hypothesis(model, rows):
    expected = one_by_one(model, rows)
    for i, row in enumerate(rows):  # the longest batch is not the first now
        row["duration"] = 0.1 + 0.01 * i
    assert decode(model, rows, batch_seconds=0.2, num_workers=3) == expected


def test_an_utterance_too_short_for_features_has_an_empty_hypothesis(model, rows, tmp_path):
    rows.insert(1, {"audio_filepath": str(write_audio(tmp_path / "click.wav", 0.015)), "duration": 0.015})
    rows.append({"audio_filepath": str(write_audio(tmp_path / "blip.wav", 0.03)), "duration": 0.03})
    texts = decode(model, rows)
    assert texts[1] == "" and texts[0] == one_by_one(model, rows[:1])[0]
    assert decode(model, rows[-1:]) == texts[-1:]  # a batch of nothing but a few frames


def test_decoding_leaves_the_model_as_it_was(model, rows):
    model.train()
    model.encoder.eval()  # a frozen encoder
    modes = [module.training for module in model.modules()]
    featurizer = model.preprocessor.featurizer
    before = (featurizer.dither, featurizer.pad_to)
    threads = torch.get_num_threads()
    try:
        first = decode(model, rows, num_workers=2, batch_seconds=1.0)
        assert first == decode(model, rows)  # neither SpecAugment, dropout nor dither take part
        assert [module.training for module in model.modules()] == modes
        assert (featurizer.dither, featurizer.pad_to) == before and before[0] > 0 and torch.get_num_threads() == threads
    finally:
        model.eval()


def test_beam_search_in_the_model_is_not_what_is_measured(model, rows):
    from omegaconf import OmegaConf, open_dict

    from recipes.decode import greedy_decoding

    expected = decode(model, rows)
    cfg = OmegaConf.create(OmegaConf.to_container(model.cfg.decoding))
    with open_dict(cfg):
        cfg.strategy = "greedy"
    own = model.decoding
    try:
        model.decoding = type(own)(cfg, vocabulary=list(model.decoder.vocabulary))
        assert greedy_decoding(model).cfg.strategy == "greedy_batch" and model.decoding.cfg.strategy == "greedy"
        assert decode(model, rows) == expected
    finally:
        model.decoding = own


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_rates_are_those_of_known_edits(model, rows, tmp_path):
    texts = decode(model, rows)
    words = [text.split() for text in texts]
    assert all(len(w) >= 2 for w in words)
    references = [
        texts[0],
        " ".join([*words[1], "two", "more"]),  # 2 deletions
        " ".join(words[2][1:]),  # 1 insertion
        " ".join(["0000", *words[3][1:]]),  # 1 substitution
        texts[4].upper(),  # none: both sides are normalised
        "",  # all words are insertions
    ]
    for row, text in zip(rows, references):
        row["text"] = text
    metrics = evaluate_model(model, write_rows(tmp_path / "m.json", rows), progress=False)
    found = metrics["overall"]["words"]
    reference = sum(len(text.split()) for text in references)
    assert found == {"substitutions": 1, "deletions": 2, "insertions": 1 + len(words[5]), "reference": reference}
    assert metrics["overall"]["wer"] == pytest.approx((4 + len(words[5])) / reference)
    assert metrics["overall"]["wer"] == metrics["manifests"][0]["wer"]
    low, high = metrics["overall"]["wer_interval"]
    assert 0 <= low < metrics["overall"]["wer"] < high


def test_overall_sums_the_manifests_and_cost_is_measured(model, rows, tmp_path):
    a, b = write_rows(tmp_path / "a.json", rows[:2]), write_rows(tmp_path / "b.json", rows[2:])
    metrics = evaluate_model(model, [a, b], progress=False)
    first, second, overall = *metrics["manifests"], metrics["overall"]
    assert [first["name"], second["name"]] == ["a", "b"]
    for key in ("words", "characters"):
        assert overall[key] == {name: first[key][name] + second[key][name] for name in first[key]}
    counts = overall["words"]
    assert overall["wer"] == (sum(counts.values()) - counts["reference"]) / counts["reference"]
    assert overall["utterances"] == 6 and overall["hours"] == pytest.approx(sum(r["duration"] for r in rows) / 3600)
    assert overall["seconds"] == pytest.approx(first["seconds"] + second["seconds"])
    assert overall["real_time_factor"] == pytest.approx(overall["seconds"] / (overall["hours"] * 3600), rel=0.05)
    assert "lower case" in metrics["normalisation"] and metrics["decoding"] == "greedy CTC"


def test_durations_that_lie_change_neither_hours_nor_speed_and_are_told_once(model, rows, tmp_path):
    honest = evaluate_model(model, write_rows(tmp_path / "m.json", rows), progress=False)
    assert honest["manifests"][0]["durations_off"] == 0 and " off " not in report(honest)
    rows[2]["duration"], rows[4]["duration"] = 300, 0.2
    rows[0]["duration"] += 0.009
    path = write_rows(tmp_path / "m.json", rows)
    metrics = evaluate_model(model, path, progress=False)
    for result in (*metrics["manifests"], metrics["overall"]):
        assert result["hours"] == honest["overall"]["hours"]
        assert result["real_time_factor"] == pytest.approx(result["seconds"] / 6.3, rel=1e-2, abs=1e-3)
    shown = report(metrics)
    assert f"m: 2 of 6 durations are off by more than 0.01 s, {path}:3 says 300 s of 2.100 s" in shown
    assert shown.count(" off ") == 1


def test_report_shows_totals_normalisation_and_pairs(model, rows, tmp_path):
    a, b = write_rows(tmp_path / "a.json", rows[:2]), write_rows(tmp_path / "b.json", rows[2:])
    shown = report(evaluate_model(model, [a, b], progress=False), pairs=2)
    table = shown.split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in table[:4]] == ["manifest", "a", "b", "all"]
    assert "normalisation: references and hypotheses alike" in shown
    assert shown.count("  ref  ") == shown.count("  hyp  ") == 2
    assert report(evaluate_model(model, a, progress=False), pairs=0).count("  ref  ") == 0


# ---- files ----------------------------------------------------------------------------------------------------------


def test_predictions_keep_every_field_and_are_read_by_us_and_by_nemo(model, rows, tmp_path):
    rows[2]["custom"] = {"nested": [1, "ü"]}
    rows[3]["pred_text"] = "from an older run"
    path = write_rows(tmp_path / "m.json", rows)
    metrics = evaluate_model(model, path, output=tmp_path / "out", progress=False)
    predictions = tmp_path / "out" / "predictions_m.json"
    assert metrics["manifests"][0]["predictions"] == str(predictions)
    written = read_manifest(predictions)
    expected = decode(model, rows)
    assert written == [{**row, "pred_text": text} for row, text in zip(rows, expected)]

    from nemo.collections.asr.parts.utils.manifest_utils import read_manifest as nemo_read
    from nemo.collections.common.parts.preprocessing.manifest import item_iter

    assert [row["pred_text"] for row in nemo_read(str(predictions))] == expected
    items = list(item_iter([str(predictions)]))
    assert [item["audio_file"] for item in items] == [row["audio_filepath"] for row in rows]
    assert [item["text"] for item in items] == [row["text"] for row in rows]
    stored = json.loads((tmp_path / "out" / "metrics.json").read_text())
    metrics.pop("pairs")
    assert stored == json.loads(json.dumps(metrics))


def test_relative_audio_paths_still_hold_from_the_predictions_folder(model, tmp_path):
    rows = corpus(tmp_path / "data" / "clips", seconds=(0.5, 0.6))
    for row in rows:
        row["audio_filepath"] = os.path.relpath(row["audio_filepath"], tmp_path / "data")
    path = write_rows(tmp_path / "data" / "m.json", rows)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    evaluate_model(model, path, output=tmp_path / "link" / "deep", progress=False)
    predictions = tmp_path / "link" / "deep" / "predictions_m.json"
    written = read_manifest(predictions)
    assert all(not os.path.isabs(row["audio_filepath"]) for row in written)
    again = evaluate_model(model, predictions, progress=False)  # finds the audio
    assert [pair["hypothesis"] for pair in again["pairs"]] == [row["pred_text"] for row in written]


def test_a_manifest_without_text_gets_predictions_only(model, rows, tmp_path):
    for row in rows:
        del row["text"]
    path = write_rows(tmp_path / "plain.json", rows)
    metrics = evaluate_model(model, path, output=tmp_path, progress=False)
    assert metrics["overall"]["wer"] is None and metrics["manifests"][0]["words"] is None
    assert "no text: predictions only" in report(metrics)
    written = [json.loads(line) for line in open(tmp_path / "predictions_plain.json")]
    assert [row["pred_text"] for row in written] == decode(model, rows) and "text" not in written[0]
    # beside one with text: scored apart, and the total is of what has text
    scored = write_rows(tmp_path / "scored.json", [{**rows[0], "text": "a b"}])
    both = evaluate_model(model, [path, scored], progress=False)
    assert both["overall"]["wer"] == both["manifests"][1]["wer"] and both["overall"]["utterances"] == 7


def test_names_are_distinct_and_fit_into_file_names(tmp_path, rows):
    paths = [write_rows(tmp_path / folder / "test.json", rows) for folder in ("clean", "other")]
    assert [one.name for one in read_sets(paths)] == ["clean_test", "other_test"]
    assert [one.name for one in read_sets(paths, ["x", "y"])] == ["x", "y"]
    bad = ((["x"], "1 names for 2 manifests"), (["x", "x"], "not distinct"), (["a/b", "c"], "without slashes"))
    for names, said in bad:
        with pytest.raises(ValueError, match=said):
            read_sets(paths, names)


def test_an_evaluation_is_beside_the_model_under_the_names_of_its_sets(tmp_path):
    assert default_output(tmp_path / "m.nemo", ["dev", "test"]) == tmp_path / "evaluation" / "dev+test"
    for name in FOLDERS:  # nothing is written between the repository's own files
        assert default_output(pretrained_path(name), ["dev"]) == ROOT / "exp" / f"{name}_pretrained" / "evaluation" / "dev"


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def memory(monkeypatch):
    """A machine on which only so many samples are decoded at once."""
    def made(samples: int):
        def limited(model, audio_BT, lengths, precision="32"):
            if audio_BT.numel() > samples:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            return log_probs(model, audio_BT, lengths, precision)

        monkeypatch.setattr("recipes.decode.log_probs", limited)

    return made


def test_a_batch_that_does_not_fit_is_decoded_in_halves(model, rows, memory):
    expected = one_by_one(model, rows)
    memory(int(2.2 * RATE))
    assert decode(model, rows, batch_seconds=100, num_workers=1) == expected


def test_an_utterance_that_does_not_fit_alone_is_named(model, rows, memory):
    memory(2 * RATE)
    with pytest.raises(ModelError, match=r"u2\.wav: its 2 s do not fit into the memory of cpu: cut it") as raised:
        decode(model, rows, batch_seconds=100, num_workers=1)
    assert "\n" not in str(raised.value)


# ---- what is wrong --------------------------------------------------------------------------------------------------


def run_main(capsys, *arguments) -> tuple[int, str]:
    """(exit status, last line on stderr), in this process."""
    with pytest.raises(SystemExit) as ended:
        evaluate.main(list(map(str, arguments)))
    return ended.value.code, capsys.readouterr().err.strip()


def test_missing_audio_names_manifest_line_and_file(model, rows, tmp_path):
    rows[3]["audio_filepath"] = str(tmp_path / "gone.wav")
    rows[5]["audio_filepath"] = str(tmp_path / "gone too.wav")
    path = write_rows(tmp_path / "m.json", rows)
    with pytest.raises(ManifestError, match=r"m\.json:4: no audio file '.*gone\.wav' \(and 1 more\)") as caught:
        evaluate_model(model, path, output=tmp_path / "out", progress=False)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_audio_that_cannot_be_decoded_names_manifest_and_line(model, rows, tmp_path):
    Path(rows[1]["audio_filepath"]).write_bytes(b"RIFF but no more")
    rows[4]["audio_filepath"] = str(write_audio(tmp_path / "stereo.wav", 1.6, channels=2))
    path = write_rows(tmp_path / "m.json", rows)
    with pytest.raises(ManifestError, match=r"m\.json:5: .*stereo\.wav: 2 channels"):
        evaluate_model(model, path, output=tmp_path / "out", progress=False, num_workers=1, batch_seconds=1.0)
    rows[4]["audio_filepath"] = rows[0]["audio_filepath"]
    for workers in (1, 3):
        with pytest.raises(ManifestError, match=r"m\.json:2: .*u1\.wav: audio cannot be read"):
            evaluate_model(model, write_rows(path, rows), progress=False, num_workers=workers, batch_seconds=0.5)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_audio_that_is_not_finite_names_manifest_and_line(model, rows, tmp_path, value):
    samples = soundfile.read(rows[3]["audio_filepath"])[0]
    samples[5000] = value
    rows[3]["audio_filepath"] = str(tmp_path / "bad.wav")
    soundfile.write(tmp_path / "bad.wav", samples, RATE, subtype="FLOAT")
    path = write_rows(tmp_path / "m.json", rows)
    for workers in (1, 3):
        with pytest.raises(ManifestError, match=r"m\.json:4: .*bad\.wav: holds samples that are not finite"):
            evaluate_model(model, path, progress=False, num_workers=workers, batch_seconds=0.5)


def test_text_on_some_lines_only_is_refused(rows, tmp_path):
    del rows[2]["text"]
    with pytest.raises(ManifestError, match=r"m\.json:3: no text, as on 1 of 6 lines"):
        read_sets(write_rows(tmp_path / "m.json", rows))


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "missing mandatory option: give model=..."),
        (["model=x.nemo"], "missing mandatory option: give manifests=..."),
        (["model=MODEL", "manifest=a.json"], "unknown key 'manifest'; did you mean manifests?"),
        (["model=MODEL", "manifests=MANIFEST", "--pairs"], "'--pairs' is not KEY=VALUE; write for example pairs=VALUE"),
        (["model=MODEL", "manifests=MANIFEST", "pairs=many"], "pairs=many: Value 'many'"),
        (["model=MODEL", "manifests=MANIFEST", "batch_seconds=-3"], "batch_seconds=-3.0: must be above 0"),
        (["model=MODEL", "manifests=MANIFEST", "precision=16"], "precision=16: use one of 32, bf16-mixed"),
        (["model=none.nemo", "manifests=MANIFEST"], "model=none.nemo: no such file"),
        (["model=MANIFEST", "manifests=MANIFEST"], ".json is no known kind; give a .nemo, or a Lightning .ckpt"),
        (["model=MODEL", "manifests=a.json,b.json"], "no such file; for several write manifests=[a,b]"),
        (["model=MODEL", "manifests=[]"], "give one path or a list, manifests=[a,b]"),
        (["model=MODEL", "manifests=[a.json"], "cannot be read"),
    ],
)
def test_bad_arguments_are_one_line(arguments, said, saved, rows, tmp_path, capsys):
    manifest = write_rows(tmp_path / "m.json", rows)
    arguments = [a.replace("MODEL", str(saved)).replace("MANIFEST", str(manifest)) for a in arguments]
    status, error = run_main(capsys, *arguments)
    assert status == 2 and said in error and "\n" not in error and error.startswith("evaluate.py: ")


def test_models_that_are_none_are_one_line(rows, tmp_path, capsys):
    manifest = write_rows(tmp_path / "m.json", rows)
    broken = tmp_path / "broken.nemo"
    broken.write_bytes(b"not a tar file")
    status, error = run_main(capsys, f"model={broken}", f"manifests={manifest}", "device=cpu")
    assert status == 1 and "broken.nemo: cannot be loaded as a NeMo model" in error and "\n" not in error
    torch.save({"state_dict": {}}, tmp_path / "bare.ckpt")
    status, error = run_main(capsys, f"model={tmp_path / 'bare.ckpt'}", f"manifests={manifest}", "device=cpu")
    assert status == 1 and "holds no model configuration" in error and "\n" not in error
    assert not (tmp_path / "evaluation").exists()


def test_unknown_device_is_one_line(saved, rows, tmp_path, capsys):
    manifest = write_rows(tmp_path / "m.json", rows)
    for device in ("gpu", "cuda:99"):
        status, error = run_main(capsys, f"model={saved}", f"manifests={manifest}", f"device={device}")
        assert status == 1 and f"device={device}" in error and "use" in error and "\n" not in error


def test_help_and_errors_do_not_import_nemo_or_torch():
    for arguments in (["--help"], ["modle=x"]):
        program = (
            "import sys, runpy; sys.argv = ['recipes/evaluate.py', *sys.argv[1:]]\n"
            "try: runpy.run_path('recipes/evaluate.py', run_name='__main__')\n"
            "except SystemExit as end: code = end.code\n"
            "print(code, sorted({m.split('.')[0] for m in sys.modules} & {'nemo', 'torch', 'lightning', 'lhotse'}))\n"
        )
        done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1].endswith(" []"), done.stdout + done.stderr
        assert "batch_seconds" in done.stdout if arguments == ["--help"] else "did you mean model?" in done.stderr


# ---- whole runs -----------------------------------------------------------------------------------------------------


def test_a_lightning_checkpoint_gives_what_the_nemo_file_gives(model, rows, tmp_path):
    import lightning.pytorch as pl

    from recipes.decode import load_model

    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = load_model(tmp_path / "last.ckpt", "cpu")
    assert type(loaded) is type(model) and not loaded.training
    assert decode(loaded, rows) == decode(model, rows)


def test_real_speech_with_a_model_of_ours_in_a_fresh_process(librispeech_sample, tmp_path):
    """`python recipes/evaluate.py`, from the root, of a model whose classes only this project knows."""
    from recipes.ctc_model import CTCModel

    cfg = tiny.config()
    cfg.encoder = {"_target_": "recipes.deepspeech2.encoder.DeepSpeech2Encoder", "feat_in": 16, "conv_channels": [4, 4],
                   "rnn_layers": 1, "rnn_hidden": 16}
    cfg.decoder.feat_in = None
    torch.manual_seed(0)
    ours = CTCModel(cfg).eval()
    tiny.talkative(ours)
    ours.save_to(str(tmp_path / "ours.nemo"))
    rows = []
    for path in sorted(librispeech_sample.rglob("*.flac"))[::12]:
        texts = dict(line.split(" ", 1) for line in next(path.parent.glob("*.trans.txt")).read_text().splitlines())
        duration = soundfile.info(path).frames / RATE
        rows.append({"audio_filepath": str(path), "duration": duration, "text": texts[path.stem].lower()})
    manifest = write_rows(tmp_path / "real speech.json", rows)
    done = subprocess.run(
        [sys.executable, "recipes/evaluate.py", f"model={tmp_path}/ours.nemo", f"manifests={manifest}", "device=cpu",
         "pairs=1"],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "real speech" in done.stdout and done.stdout.count("  ref  ") == 1 and "metrics.json" in done.stdout
    for noise in ("OneLogger", "exporters", "NeMo W"):
        assert noise not in done.stderr, done.stderr
    metrics = json.loads((tmp_path / "evaluation" / "real speech" / "metrics.json").read_text())
    assert metrics["model_class"] == "recipes.ctc_model.CTCModel"
    written = read_manifest(tmp_path / "evaluation" / "real speech" / "predictions_real speech.json")
    assert [row["pred_text"] for row in written] == decode(ours, rows)
    assert metrics["overall"]["words"]["reference"] == sum(len(row["text"].split()) for row in rows)


def test_sentencepiece_models_are_decoded_as_nemo_decodes_them(rows, tmp_path):
    from recipes.ctc_model import CTCModelBPE
    from recipes.decode import load_model

    cfg = tiny.bpe_config(tmp_path)
    torch.manual_seed(0)
    CTCModelBPE(cfg).save_to(str(tmp_path / "bpe.nemo"))
    loaded = load_model(tmp_path / "bpe.nemo", "cpu")
    assert type(loaded) is CTCModelBPE
    texts = decode(loaded, rows, num_workers=2, batch_seconds=1.0)
    assert texts == one_by_one(loaded, rows) and len(set(texts)) > 1
    metrics = evaluate_model(loaded, write_rows(tmp_path / "m.json", rows), progress=False)
    assert [pair["hypothesis"] for pair in metrics["pairs"]] == texts
