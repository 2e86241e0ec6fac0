"""Configurations that cannot train are refused at the start, in one line that names the key and the nearest valid one."""

import json
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from recipes.config import ConfigError, check_against_code, compose, hydra_arguments, recipes
from tests.conftest import ROOT


@pytest.fixture
def manifests(tmp_path):
    """Overrides that point the corpus at two manifests that exist."""
    for name in ("train", "dev"):
        (tmp_path / f"{name}.json").write_text('{"audio_filepath": "a.flac", "duration": 2.0, "text": "a"}\n')
    return [f"corpus.train={tmp_path}/train.json", f"corpus.validation={tmp_path}/dev.json"]


def test_recipes_are_the_four_models():
    assert recipes() == ["conformer", "conformer_bpe", "deepspeech", "deepspeech2"]


@pytest.mark.parametrize("recipe", recipes())
@pytest.mark.parametrize("corpus", ["mini", "librispeech_5h", "librispeech_8h", "librispeech_100h", "librispeech_960h"])
@pytest.mark.parametrize("size", ["small", "medium", "large", "full"])
def test_every_recipe_composes_with_every_corpus_and_size(recipe, corpus, size, manifests):
    overrides = [f"corpus={corpus}", f"size={size}", *manifests]
    if recipe.endswith("_bpe"):
        overrides.append("model.tokenizer.dir=x")
    cfg = compose(recipe, overrides)
    assert cfg.name == recipe and cfg.corpus.name == corpus
    assert cfg.model.optim.lr > 0


def test_noise_and_rooms_are_for_waveforms(manifests):
    rooms = ["model.train_ds.cache_features=false", "model.noise_and_rooms.room_probability=0.5"]
    assert compose("deepspeech2", [*rooms, *manifests]).model.noise_and_rooms.room_probability == 0.5
    assert compose("deepspeech2", ["model.noise_and_rooms=null", *manifests]).model.noise_and_rooms is None


@pytest.mark.parametrize("blocks, middle", [(1, 0), (2, 0), (4, 1), (6, 2), (17, 8)])
def test_the_intermediate_loss_is_half_way_up_whatever_the_number_of_blocks(blocks, middle, manifests):
    cfg = compose("conformer", [f"model.encoder.n_layers={blocks}", *manifests])
    assert OmegaConf.to_container(cfg.model, resolve=True)["interctc"]["apply_at_layers"] == [middle]
    assert compose("conformer", ["model.interctc=null", *manifests]).model.interctc is None


@pytest.mark.parametrize("trainer", ["cpu", "cpu_ddp", "gpu", "ddp", "slurm"])
@pytest.mark.parametrize("logger", ["default", "csv", "wandb"])
@pytest.mark.parametrize("debug", ["none", "fast"])
def test_every_trainer_logger_and_debug_option_composes(trainer, logger, debug, manifests):
    cfg = compose("deepspeech2", [f"trainer={trainer}", f"logger={logger}", f"debug={debug}", *manifests])
    assert cfg.trainer.use_distributed_sampler is False
    assert cfg.exp_manager.create_wandb_logger is (logger == "wandb")


INNER = "+model.interctc.loss_weights=[0.3]"


@pytest.mark.parametrize(
    "recipe, overrides, words",
    [
        ("deepspeech3", [], ["deepspeech3", "did you mean deepspeech"]),
        ("deepspeech2", ["model.optim.lrr=4"], ["model.optim.lrr", "did you mean model.optim.lr?"]),
        ("deepspeech2", ["model.encoder.rnn_layer=4"], ["model.encoder.rnn_layer", "model.encoder.rnn_layers"]),
        ("deepspeech2", ["trainr.max_steps=4"], ["trainr", "did you mean trainer"]),
        ("deepspeech2", ["corpus=libri"], ["'libri'", "corpus"]),
        ("deepspeech2", ["trainer=tpu"], ["'tpu'", "trainer"]),
        ("deepspeech2", ["model.optim.lr=[1"], ["override"]),
        ("deepspeech2", ["trainer.sync_batchnorm=true"], ["trainer.sync_batchnorm=true", "false"]),
        ("deepspeech2", ["trainer.use_distributed_sampler=true"], ["use_distributed_sampler=false"]),
        ("deepspeech2", ["+model.train_ds.shar_path=x"], ["trainer.max_steps"]),
        ("deepspeech2", ["+model.train_ds.tarred_audio_filepaths=x"], ["trainer.max_steps"]),
        ("deepspeech2", ["+model.train_ds.shar_path=x", "trainer.max_steps=9"], ["cache_features=true", "false"]),
        ("deepspeech2", ["trainer.precision=16-mixed"], ["trainer.precision=16-mixed", "bf16-mixed"]),
        ("deepspeech2", ["trainer=gpu", "trainer.precision=16-mixed"], ["16-mixed", "model.optim.fused=false"]),
        ("conformer", ["trainer=ddp", "trainer.sync_batchnorm=true"], ["trainer.sync_batchnorm=true", "set it to false"]),
        ("deepspeech2", ["lr=1"], ["unknown key lr", "model.optim.lr"]),
        ("deepspeech2", ["epochs=5"], ["unknown key epochs", "training.epochs"]),
        ("deepspeech2", ["model.optim.lr=abc"], ["model.optim.lr=abc", "a number"]),
        ("deepspeech2", ["~model.optim.lr"], ["model.optim.lr"]),
        ("deepspeech2", ["model.optim=null"], ["model.optim is empty"]),
        ("deepspeech2", ["model.optim.lr=${foo}"], ["foo"]),
        ("deepspeech2", ["model.encoder=null"], ["model.encoder"]),
        ("deepspeech2", ["model.labels=[]"], ["model.labels is empty"]),
        ("deepspeech2", ["model.tempo=x"], ["model.tempo=x"]),
        ("deepspeech2", ["training.epochs=null"], ["training.epochs", "a number"]),
        ("deepspeech2", ["trainer.max_steps=abc"], ["trainer.max_steps=abc", "whole number"]),
        ("deepspeech2", ["trainer.devices=0"], ["trainer.devices=0", "1 or more"]),
        ("deepspeech2", ["trainer.val_check_interval=0"], ["val_check_interval=0", "training.validations"]),
        ("deepspeech2", ["trainer.accumulate_grad_batches=0"], ["accumulate_grad_batches=0"]),
        ("deepspeech2", ["exp_manager.explicit_log_dir=null"], ["explicit_log_dir"]),
        ("deepspeech2", ["corpus=mini,librispeech_8h"], ["corpus=mini,librispeech_8h", "one at a time"]),
        ("deepspeech2", ["trainer.max_epochs=2"], ["trainer.max_epochs=2", "training.epochs=2"]),
        ("deepspeech2", ["trainer.devices=2"], ["trainer=cpu_ddp"]),
        ("deepspeech2", ["training.warmup_share=10"], ["training.warmup_share=10"]),
        ("deepspeech2", ["training.global_batch_seconds=0"], ["training.global_batch_seconds=0"]),
        ("deepspeech2", ["model.optim.lr=0"], ["model.optim.lr=0"]),
        ("deepspeech2", ["model.optim.lr=???"], ["missing mandatory value: model.optim.lr"]),
        ("deepspeech2", ["model.noise_and_rooms.noise_probability=0.5"], ["model.train_ds.cache_features=false"]),
        ("deepspeech2", ["+model.train_ds.rir_enabled=true"], ["model.train_ds.rir_enabled", "cache_features=false"]),
        ("conformer", ["model.interctc.apply_at_layers=[4]"], ["apply_at_layers=[4]", "0 to 3", "model.interctc=null"]),
        ("deepspeech2", ["model.interctc.apply_at_layers=[3]"], ["apply_at_layers=[3]", "0 to 2"]),
        ("deepspeech", [INNER, "+model.interctc.apply_at_layers=[0]"], ["leaves no layers"]),
        ("conformer", ["model.tempo=1.1"], ["model.tempo=1.1"]),
        ("conformer_bpe", ["model.tokenizer.dir=x", "model.bpe_dropout=1"], ["model.bpe_dropout=1"]),
        ("conformer_bpe", [], ["missing mandatory value: model.tokenizer.dir"]),
    ],
)
def test_a_bad_configuration_is_one_clear_line(recipe, overrides, words, manifests):
    with pytest.raises(ConfigError) as error:
        compose(recipe, [*manifests, *overrides])
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_missing_manifest_says_what_makes_it(tmp_path):
    with pytest.raises(ConfigError, match="run.sh --corpus mini --stop-stage 1"):
        compose("deepspeech2", [f"corpus.train={tmp_path}/none.json"])


@pytest.mark.parametrize(
    "override, words",
    [
        ("+model.encoder.rnn_layer=4", ["model.encoder.rnn_layer", "rnn_layers"]),
        ("+model.optim.wieght_decay=0.1", ["model.optim.wieght_decay", "weight_decay"]),
        ("+model.optim.sched.warmup=100", ["model.optim.sched.warmup"]),
        ("+trainer.max_step=5", ["trainer.max_step", "max_steps"]),
        ("+model.train_ds.batch_durations=5", ["batch_durations", "batch_duration"]),
        ("+exp_manager.resume=true", ["exp_manager.resume"]),
        ("model.optim.name=adamv", ["model.optim.name=adamv"]),
        ("model.encoder._target_=recipes.deepspeech2.encoder.DeepSpech2", ["model.encoder._target_"]),
    ],
)
def test_a_key_that_nothing_reads_is_refused(override, words, manifests):
    cfg = compose("deepspeech2", [*manifests, override])
    with pytest.raises(ConfigError) as error:
        check_against_code(cfg)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("recipe", recipes())
@pytest.mark.parametrize("size", ["small", "medium", "large", "full"])
def test_every_key_of_our_own_recipes_is_read_by_something(recipe, size, manifests):
    extra = ["model.tokenizer.dir=x"] if recipe.endswith("_bpe") else []
    check_against_code(cfg := compose(recipe, [*manifests, *extra, f"size={size}"]))
    assert cfg.model.encoder["_target_"].startswith("recipes.")


def test_logger_group_is_spelled_as_users_type_it():
    assert hydra_arguments(["logger=wandb", "model.optim.lr=1"]) == ["logger@exp_manager=wandb", "model.optim.lr=1"]


@pytest.mark.parametrize("start", [["recipes/train.py"], ["-m", "recipes.train"]])
def test_both_ways_to_start_refuse_without_a_traceback(start):
    done = subprocess.run([sys.executable, *start, "model.optim.lrr=1"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "model.optim.lr?" in done.stderr


@pytest.mark.parametrize("steps", [503, 500, 7, 1, 1999])
def test_steps_that_were_asked_for_are_validated_about_as_often_as_wanted_and_near_the_end(steps):
    from recipes.train import fill_in

    cfg = compose("deepspeech2", [f"trainer.max_steps={steps}", "training.validations=8"])
    fill_in(cfg)
    count, left = divmod(steps, cfg.trainer.val_check_interval)
    assert cfg.trainer.max_steps == steps and min(4, steps) <= count <= 8 and left <= 3


def test_utterances_that_are_not_trained_on_are_counted(tmp_path):
    from recipes.train import fill_in

    rows = [{"audio_filepath": "a.flac", "duration": seconds, "text": "a"} for seconds in (0.05, 2.0, 70.0, 3.0)]
    (tmp_path / "train.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifests = [f"corpus.{part}={tmp_path}/train.json" for part in ("train", "validation")]
    said = fill_in(compose("deepspeech2", [*manifests, "corpus.max_duration=60"]))
    assert said.startswith("2 of 4 utterances, 0.02 h, are not trained on") and "=60 s" in said
    assert fill_in(compose("deepspeech2", [*manifests, "corpus.max_duration=80", "model.train_ds.min_duration=0.01"])) == ""


def test_features_that_do_not_fit_into_the_memory_are_not_kept(tmp_path, monkeypatch):
    from recipes import train

    (tmp_path / "train.json").write_text('{"audio_filepath": "a.flac", "duration": 10.0, "text": "a"}\n')  # 160 kB
    manifests = [f"corpus.{part}={tmp_path}/train.json" for part in ("train", "validation")]
    for free, kept in [(400_000, True), (300_000, False)]:
        monkeypatch.setattr(train, "free_memory", lambda: free)
        cfg = compose("deepspeech2", manifests)
        assert ("model.train_ds.cache_features is off" in train.fill_in(cfg)) is not kept
        assert cfg.model.train_ds.cache_features is kept
