"""Benches of networks at tiny scale: they run, their JSON has its fields, and different weights are noticed first.

No test asserts a time.
"""

import json

import pytest
import torch

from recipes.lengths import valid_mask
from tests.recipes import tiny
from tools.bench import __main__ as bench
from tools.bench import batch, conformer, deepspeech2, evaluate, loader
from tools.bench._common import BenchError
from tools.bench._training import FeatureBatch, compose_recipe, feature_batches, noise_manifest

CPU = torch.device("cpu")
LABELS = 28
CONFORMER = {**conformer.NEMO, "n_layers": 2, "d_model": 16, "n_heads": 2, "conv_kernel_size": 5}
DEEPSPEECH2 = {"feat_in": 80, "conv_channels": [4, 4], "conv_kernels": [[5, 5], [5, 5]],
               "conv_strides": [[2, 2], [2, 2]], "rnn_layers": 2, "rnn_hidden": 12}
SMALL = ["model.encoder.n_layers=1", "model.encoder.d_model=16", "model.encoder.n_heads=2",
         "model.encoder.subsampling_conv_channels=4"]
SMALL_DS2 = ["model.encoder.conv_channels=[4,4]", "model.encoder.rnn_layers=1", "model.encoder.rnn_hidden=16"]


@pytest.fixture(scope="module")
def batches() -> list[FeatureBatch]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for frames in ([120, 90, 40], [100, 100, 60]):
        lengths = torch.tensor(frames)
        # zeros on padding, as the preprocessor gives them
        features = torch.randn(3, 80, max(frames), generator=generator) * valid_mask(lengths, max(frames))[:, None]
        targets = torch.randint(LABELS, (3, 8), generator=generator)
        made.append(FeatureBatch(features, lengths, targets, torch.tensor([8, 6, 4]), sum(frames) / 100))
    return made


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    return noise_manifest(tmp_path_factory.mktemp("noise"), 12, (0.6, 1.4))


def check_case(case):
    assert case["ratio"].keys() == {"wall", "cpu"} and case["ratio"]["cpu"]["count"] == 2
    assert case["equal"]["outputs"] < 1e-3 and case["equal"]["gradients"] < 1e-3
    assert case["peak_bytes"].keys() == case["seconds_a_step"].keys() == {"ours", "theirs"}
    assert [b["padding"] for b in case["batches"]] == pytest.approx([1 - 250 / 360, 1 - 260 / 300], abs=1e-4)
    json.dumps(case)


def add_a_little(module):
    with torch.no_grad():
        next(p for p in module.parameters() if p.ndim > 1).add_(0.05)


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_conformer(batches, precision):
    check_case(conformer.run_case(CONFORMER, batches, 80, LABELS, CPU, precision))


def test_conformer_with_other_weights_is_not_measured(batches):
    with pytest.raises(BenchError, match="differ by .* nothing was measured"):
        conformer.run_case(CONFORMER, batches, 80, LABELS, CPU, "32", spoil=add_a_little)


def test_sizes_of_the_conformer():
    assert conformer.settings_of("S")["d_model"] == 176 and conformer.settings_of("L")["n_layers"] == 18
    small = conformer.settings_of("small", {"_target_": "x", "feat_in": 80, "n_layers": 4, "d_model": 144})
    # what the recipe does not say is said to NeMo, whose default is another
    assert small["xscaling"] is False and small["dropout_att"] == 0.0 and "_target_" not in small
    with pytest.raises(BenchError, match="--sizes XL: use small, S, L"):
        conformer.settings_of("XL")


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_deepspeech2(batches, norm):
    settings = {**DEEPSPEECH2, "rnn_norm": norm, "residual": norm == "layer"}
    check_case(deepspeech2.run_case(settings, batches, LABELS, CPU, "32"))


def test_deepspeech2_with_other_weights_is_not_measured(batches):
    with pytest.raises(BenchError, match="nothing was measured"):
        deepspeech2.run_case(DEEPSPEECH2, batches, LABELS, CPU, "32", spoil=add_a_little)
    with pytest.raises(BenchError, match="bidirectional GRU"):
        deepspeech2.run_case({**DEEPSPEECH2, "rnn_type": "lstm"}, batches, LABELS, CPU, "32")


def test_batches_are_the_recipes_own(noise):
    cfg = compose_recipe("conformer", "mini", noise)
    made = feature_batches(cfg, 4.0, 3)
    assert len(made) == 3 and all(batch.seconds <= 4.0 + 1e-6 and 0 <= batch.padding < 0.6 for batch in made)
    assert made[0].features.shape[1] == 80 and made[0].targets.shape[0] == made[0].features.shape[0]
    with pytest.raises(BenchError, match="no batch of 4 s"):
        feature_batches(compose_recipe("conformer", "mini", noise, "corpus.max_duration=0.2"), 4.0, 1)
    with pytest.raises(BenchError, match="no recipe 'conformr'"):
        compose_recipe("conformr", "mini", noise)


def test_conformer_from_the_command_line(noise, tmp_path, capsys):
    out = tmp_path / "conformer.json"
    argv = ["--sizes", "small", "--manifest", str(noise), "--corpus", "mini", "--batch-seconds", "3", "--pairs", "2",
            "--device", "cpu", "--precision", "32", "--note", "one thread of a shared machine", "--json", str(out)]
    assert bench.main(["conformer", *argv]) == 0
    assert "ours is faster by" in capsys.readouterr().out
    saved = json.loads(out.read_text())
    assert saved["cases"]["small"]["precision"] == "32" and saved["machine"]["threads"] == torch.get_num_threads()
    assert str(noise.parent) not in out.read_text()
    assert "one thread of a shared machine" in (tmp_path / "README.md").read_text()
    assert bench.main(["conformer", "--manifest", str(tmp_path / "none.json")]) == 1
    assert "no such file" in capsys.readouterr().err


def test_evaluate(noise, tmp_path, capsys):
    out = tmp_path / "evaluate.json"
    argv = ["--manifest", str(noise), "--utterances", "6", "--batch-sizes", "4", "--rounds", "1", "--device", "cpu",
            "--json", str(out), "--override", *SMALL]
    assert bench.main(["evaluate", *argv]) == 0, capsys.readouterr().err
    case = json.loads(out.read_text())["case"]
    assert case["agree"] >= 0.99 and case["same_object"] is False and case["utterances"] == 6
    assert case["ratio"]["4"]["wall"]["count"] == 1


def test_evaluate_notices_other_weights(noise):
    from recipes.data import read_rows

    cfg = compose_recipe("conformer", "mini", noise, *SMALL)
    model = evaluate.random_model(cfg)
    twin = evaluate.stock_twin(model)
    assert type(twin.encoder).__module__.startswith("nemo.")
    with torch.no_grad():
        twin.decoder.decoder_layers[0].weight.copy_(twin.decoder.decoder_layers[0].weight.roll(3, 0))
    with pytest.raises(BenchError, match="of the texts agree"):
        evaluate.run_case(model, twin, read_rows(noise)[:4], [4], 1)
    with pytest.raises(BenchError, match="all texts are empty"):
        evaluate.agreement(["", " "], ["", ""])


def test_loader(noise, tmp_path, capsys):
    out = tmp_path / "loader.json"
    argv = ["--manifest", str(noise), "--corpus", "mini", "--recipe", "deepspeech2", "--batch-seconds", "4", "--rounds",
            "1", "--device", "cpu", "--json", str(out), "--override", *SMALL_DS2]
    assert bench.main(["loader", *argv]) == 0, capsys.readouterr().err
    saved = json.loads(out.read_text())
    case, rates = saved["case"], saved["case"]["hours_a_second"]
    assert {"FLAC", "FLAC and features", "cache", loader.MODEL} <= rates.keys()
    assert all(rate["median"] > 0 for rate in rates.values())
    seconds = sum(row["duration"] for row in map(json.loads, noise.read_text().splitlines()))
    # every source gives the whole epoch; features are counted in frames of 10 ms
    for name in rates.keys() - {loader.MODEL}:
        assert case["audio_seconds"][name] == pytest.approx(seconds, rel=0.02), name
    assert 0 <= saved["padding"]["mini"]["waste"] < 0.5


def test_padding_waste_counts_padded_frames(tmp_path):
    one = {"audio_filepath": "/none.flac", "sampling_rate": 16000, "text": "a"}
    rows = [{**one, "duration": seconds} for seconds in (1.0, 2.0, 3.0)]
    manifest = tiny.write_rows(tmp_path / "m.json", rows)
    found = loader.padding_waste(compose_recipe("deepspeech2", "mini", manifest, "corpus.bucket_duration_bins=[9]"), 60)
    # all in one batch: 6 s in 9
    assert found["batches"] == 1 and found["waste"] == pytest.approx(1 / 3) and found["seconds_a_batch"] == 6


@pytest.mark.parametrize("recipe", ["conformer", "deepspeech2"])
def test_batch_of_a_character_model(recipe, tmp_path, capsys):
    from tools.bench._common import reset_peak, rss

    if not reset_peak():
        pytest.skip("this system does not tell a process' peak memory")
    out = tmp_path / "batch.json"
    import nemo.collections.asr  # noqa: F401  before memory is read: it takes most of it

    limit = rss() / 2**30 + 0.15
    argv = ["--recipe", recipe, "--corpus", "mini", "--limit-gib", f"{limit:.3f}", "--device", "cpu",
            "--json", str(out), "--override", "corpus.bucket_duration_bins=[4]", "corpus.max_duration=8",
            *(SMALL if recipe == "conformer" else SMALL_DS2)]
    assert bench.main(["batch", *argv]) == 0, capsys.readouterr().err
    saved = json.loads(out.read_text())
    assert saved["seconds"] >= 8 and saved["probes"][0]["bucket"] == 8
    fitted = [probe for probe in saved["probes"] if probe["fits"]]
    assert all(probe["peak"] <= limit * 2**30 + 1024 for probe in fitted)
    assert "a batch can hold" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["conformer", "conformer_bpe"])
def test_a_step_of_batch_is_the_recipes_own_at_its_slowest(recipe, noise, tmp_path, monkeypatch):
    from nemo.collections.asr.parts.mixins.interctc_mixin import InterCTCMixin

    from recipes import ctc_model

    seen, two_views, inner_losses = [], ctc_model.two_views, InterCTCMixin.add_interctc_losses

    def views(features, lengths, *targets):
        seen.append((tuple(features.shape), set(lengths.tolist())))
        return two_views(features, lengths, *targets)

    def inner(self, *args, **options):
        seen.append("intermediate")
        return inner_losses(self, *args, **options)

    monkeypatch.setattr(ctc_model, "two_views", views)
    monkeypatch.setattr(InterCTCMixin, "add_interctc_losses", inner)
    words = ["model.consistency_weight=0.2", "model.tempo=0.25", *SMALL]
    if recipe == "conformer_bpe":
        tiny.bpe_config(tmp_path)
        words.append(f"model.tokenizer.dir={tmp_path}")
    for cached in ("true", "false"):  # features and audio
        seen.clear()
        cfg = compose_recipe(recipe, "mini", noise, f"model.train_ds.cache_features={cached}", *words)
        batch.make_step(cfg, CPU, "32", 12.0)(4.0, 3)
        # the first step is of one utterance of 2 s; 400 frames (or 401) at the slowest tempo are 500 (or 501)
        (first, _), _, (shape, lengths), last = seen
        assert first[0] == 1 and shape == (3, 80, 512) and lengths <= {500, 501} and last == "intermediate"


def test_targets_are_as_dense_as_the_manifests(noise, tmp_path):
    rows = [{"audio_filepath": "x", "duration": d, "text": "a" * n} for d, n in ((2.0, 10), (2.0, 36), (0.2, 30))]
    assert batch.densest(tiny.write_rows(tmp_path / "m.json", rows)) == 18
    assert batch.densest(None) == batch.DENSITY
