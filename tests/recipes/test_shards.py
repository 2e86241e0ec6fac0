"""Training from shards is training from single files: batches, losses, resuming. Streams: what holds and what does not.

And ranks with different amounts of data: nothing waits for ever.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from manifests.schema import ManifestError, read_manifest
from manifests.shards import write_shards
from manifests.shards_format import COMBINED, ShardError
from recipes.config import ConfigError, compose
from recipes.data import CharEncoder, ResumableLoader, lhotse_loader, read_audio, read_rows
from recipes.evaluate import evaluate_model
from tests.conftest import ROOT
from tests.recipes.test_train import TINY, losses
from tests.recipes.tiny import LABELS, RATE, corpus, write_rows
from tests.recipes.tiny import model as tiny_model

TRAIN = "corpus.train="


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """24 utterances as single files, as shards, and the former's manifest in the order of the latter."""
    folder = tmp_path_factory.mktemp("shards")
    rows = corpus(folder, seconds=[0.3 + 0.05 * (i % 9) for i in range(12)], sampling_rate=RATE)
    more = corpus(folder / "more", seconds=[0.4 + 0.05 * (i % 7) for i in range(12)], sampling_rate=RATE)
    rows = [{**row, "utterance": f"{kind}{i}", "text": f"{kind} {'abcdefghijkl'[i]}"}
            for kind, part in (("u", rows), ("v", more)) for i, row in enumerate(part)]
    files = write_rows(folder / "files.json", rows)
    write_shards([files], folder / "shards", hours=0.0012)
    by_id = {row["utterance"]: row for row in rows}
    order = [by_id[row["utterance"]] for row in read_manifest(folder / "shards" / COMBINED)]
    dev = write_rows(folder / "dev.json", rows[:1])
    return {"files": write_rows(folder / "order.json", order), "shards": folder / "shards" / COMBINED, "dev": dev}


def config(manifest, **more):
    from omegaconf import OmegaConf

    return OmegaConf.create({
        "use_lhotse": True, "manifest_filepath": str(manifest), "sample_rate": RATE, "batch_duration": 1.6,
        "use_bucketing": True, "bucket_duration_bins": [0.45, 0.6], "bucket_buffer_size": 12, "shuffle_buffer_size": 1,
        "concurrent_bucketing": False, "shuffle": True, "seed": 3, "shard_seed": 3, "num_workers": 0, **more,
    })


def stream(data, **more):
    """NeMo's own way to read them."""
    folder = data["shards"].parent
    last = len(list(folder.glob("audio_*.tar"))) - 1
    return config(folder / "sharded_manifests" / f"manifest__OP_0..{last}_CL_.json",
                  tarred_audio_filepaths=str(folder / f"audio__OP_0..{last}_CL_.tar"), **more)


def loader(cfg, rank=0, world_size=1):
    return lhotse_loader(cfg, CharEncoder(LABELS), rank, world_size)


def take(batches, count) -> list[list[str]]:
    return [batch[4] for _, batch in zip(range(count), batches)]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_shards_are_those_of_the_files_sample_for_sample(data, workers):
    seen = []
    for rank in range(2):
        files, shards = (loader(config(data[kind], num_workers=workers), rank, 2) for kind in ("files", "shards"))
        assert isinstance(shards, ResumableLoader)
        for epoch in range(2):
            for one in (files, shards):
                one.sampler.set_epoch(epoch)
            for left, right in zip(files, shards, strict=True):
                assert left[4] == right[4] and all(torch.equal(x, y) for x, y in zip(left[:4], right[:4]))
                seen += left[4] if epoch == 0 else []
    # Where what is left at the end does not go round, lhotse gives an utterance twice, so that no rank waits.
    assert set(seen) == {row["utterance"] for row in read_manifest(data["files"])} and len(seen) <= 24 + 1


def test_an_epoch_of_shards_goes_on_in_the_middle(data):
    def run(state=None, until=None):
        one = loader(config(data["shards"]))
        one.sampler.set_epoch(1)
        if state:
            one.load_state_dict(json.loads(json.dumps(state)))
        ids = []
        for number, batch in enumerate(one):
            if number == until:
                break  # loaded, not trained on
            one.mark_trained()
            ids.append(batch[4])
        return ids, one.state_dict()

    whole, _ = run()
    first, state = run(until=3)
    rest, _ = run(state)
    assert len(whole) > 5 and first + rest == whole and state == {"epoch": 1, "batches": 3, "seconds": 1.6}


def test_speed_perturbation_and_other_readers_find_the_audio_in_shards(data):
    files, shards = (loader(config(data[kind], perturb_speed=True)) for kind in ("files", "shards"))
    for left, right in zip(files, shards, strict=True):
        assert left[4] == right[4] and torch.equal(left[0], right[0])
    for left, right in zip(read_rows(data["files"]), read_rows(str(data["shards"])), strict=True):
        assert np.array_equal(read_audio(left, RATE), read_audio(right, RATE))


def test_shards_are_evaluated_as_their_files_and_predictions_do_not_point_into_them(data, tmp_path):
    found = {}
    for kind in ("files", "shards"):
        evaluate_model(tiny_model(), data[kind], output=tmp_path / kind, progress=False)
        found[kind] = read_manifest(tmp_path / kind / f"predictions_{data[kind].stem}.json")
    assert [row["pred_text"] for row in found["shards"]] == [row["pred_text"] for row in found["files"]]
    assert not any("tar_offset" in row for row in found["shards"])
    next(data["shards"].parent.glob("audio_0.tar")).rename(tmp_path / "away.tar")
    try:
        with pytest.raises(ManifestError, match=r"tarred_audio_manifest.json:1: no audio file .*audio_0.tar"):
            evaluate_model(tiny_model(), data["shards"], progress=False)
    finally:
        (tmp_path / "away.tar").rename(data["shards"].parent / "audio_0.tar")


def test_shards_are_no_part_of_a_list_of_manifests(data):
    both = f"model.train_ds.manifest_filepath=[{data['files']},{data['shards']}]"
    with pytest.raises(ConfigError, match="shard all the utterances together"):
        compose("deepspeech2", [f"{TRAIN}{data['files']}", f"corpus.validation={data['dev']}", both])


def test_a_broken_shard_stops_the_run_with_the_utterance_named(data, tmp_path):
    rows = read_manifest(data["shards"])
    rows[2]["tar_offset"] += 512
    moved = write_rows(tmp_path / COMBINED, rows)
    for shard in {row["shard_id"] for row in rows}:
        (tmp_path / f"audio_{shard}.tar").symlink_to(data["shards"].parent / f"audio_{shard}.tar")
    said = f"utterance {rows[2]['utterance']} cannot be trained on: .*is not at byte"
    with pytest.raises(RuntimeError, match=said) as caught:
        list(loader(config(moved)))
    assert isinstance(caught.value.__cause__, ShardError)


def test_nemo_streams_the_same_utterances_without_end(data):
    everything = {row["utterance"]: row["text"] for row in read_manifest(data["files"])}
    endless = loader(stream(data))
    assert not isinstance(endless, ResumableLoader)
    passes = [i for batch in take(endless, 60) for i in batch]
    assert len(passes) > 2 * len(everything) and set(passes) == set(everything)
    # A run that resumes begins the stream again: nothing of it is remembered.
    assert take(loader(stream(data)), 3) == take(loader(stream(data)), 3)


def test_a_number_as_shard_seed_gives_every_device_the_same_stream_and_randomized_does_not(data):
    same, other = (
        [take(loader(stream(data, shard_seed=seed, num_workers=1), rank, 2), 3) for rank in range(2)]
        for seed in (3, "randomized")
    )
    assert same[0] == same[1] and other[0] != other[1]


def test_a_recipe_refuses_streams_that_would_repeat_themselves(data):
    streamed = stream(data)
    overrides = [
        f"model.train_ds.manifest_filepath='{streamed.manifest_filepath}'", f"corpus.validation={data['dev']}",
        f"+model.train_ds.tarred_audio_filepaths='{streamed.tarred_audio_filepaths}'", "corpus.cache_features=false",
    ]
    with pytest.raises(ConfigError, match="set trainer.max_steps"):
        compose("deepspeech2", overrides)
    overrides += ["trainer.max_steps=10"]
    with pytest.raises(ConfigError, match="shard_seed=1234 makes every device and worker read the same"):
        compose("deepspeech2", overrides)
    overrides += ["model.train_ds.shard_seed=randomized"]
    assert compose("deepspeech2", overrides).model.train_ds.shard_seed == "randomized"
    many = ["trainer=cpu_ddp", "model.train_ds.num_workers=0"]
    with pytest.raises(ConfigError, match="num_workers=0 makes every device read the same"):
        compose("deepspeech2", overrides + many)


STEPS = 12
SHORT = [
    *(item for item in TINY[2:] if not item.startswith(("trainer.max_steps", "training.global", "corpus.bucket"))),
    f"trainer.max_steps={STEPS}", "training.global_batch_seconds=2.4", "corpus.bucket_duration_bins=[0.5]",
    "trainer.precision=32", "corpus.cache_features=false", "trainer.val_check_interval=3",
    "trainer.num_sanity_val_steps=0",
]
FIT = """
import sys
from recipes.threads import set_threads
set_threads()
from recipes.quiet import quiet_imports
quiet_imports()
from recipes.config import compose
from recipes.monitor import Progress
from recipes.train import fit
class Cut(Exception): pass
watch = Progress.on_train_batch_end
def cut(self, trainer, *rest):
    watch(self, trainer, *rest)
    if trainer.global_step == 8: raise Cut
common, (files, shards, folder) = sys.argv[4:], sys.argv[1:4]
def run(manifest, name):
    fit(compose("deepspeech2", [*common, f"corpus.train={manifest}", f"exp_manager.explicit_log_dir={folder}/{name}"]))
run(files, "files")
Progress.on_train_batch_end = cut
try: run(shards, "shards")
except Cut: print("cut at step 8")
Progress.on_train_batch_end = watch
run(shards, "shards")
"""


def test_a_run_on_shards_cut_in_the_middle_of_an_epoch_has_the_losses_of_a_whole_one_on_files(data, tmp_path):
    arguments = [str(data["files"]), str(data["shards"]), str(tmp_path), *SHORT, f"corpus.validation={data['dev']}"]
    command = [sys.executable, "-c", FIT, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "cut at step 8" in done.stdout and "resumed at step 6" in done.stdout + done.stderr
    files, shards = losses(tmp_path / "files"), losses(tmp_path / "shards")
    assert list(shards) == list(files) == list(range(1, STEPS + 1))
    assert len(set(files.values())) == STEPS
    np.testing.assert_allclose(list(shards.values()), list(files.values()), rtol=1e-5)


@pytest.mark.parametrize("utterances", [1, 3, 5, 6, 7])
def test_all_ranks_get_the_same_number_of_batches_whatever_is_left_over(data, tmp_path, utterances):
    manifest = write_rows(tmp_path / "few.json", read_manifest(data["files"])[:utterances])
    for world_size in (2, 4):
        ranks = [[batch[4] for batch in loader(config(manifest), rank, world_size)] for rank in range(world_size)]
        assert len({len(batches) for batches in ranks}) == 1 and all(ids for batches in ranks for ids in batches)
        assert len({i for batches in ranks for ids in batches for i in ids}) == utterances


def test_two_processes_end_together_where_one_has_less_data(data, tmp_path):
    """An odd number of batches, over epochs, and one utterance to validate on, for two processes."""
    manifest = tmp_path / "few.json"
    for count in range(3, 24):
        write_rows(manifest, read_manifest(data["files"])[:count])
        if len(list(loader(config(manifest, batch_duration=1.2, bucket_duration_bins=[0.5])))) % 2:
            break
    else:
        pytest.fail("no number of utterances makes an odd number of batches")
    arguments = [
        "--config-name", "deepspeech2", *SHORT, f"{TRAIN}{manifest}", f"corpus.validation={data['dev']}",
        f"exp_manager.explicit_log_dir={tmp_path}/exp", "trainer=cpu_ddp",
        "trainer.precision=32",
    ]
    done = subprocess.run([sys.executable, "recipes/train.py", *arguments], cwd=ROOT, capture_output=True, text=True,
                          timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[:3000] + done.stderr[-3000:]
    assert list(losses(tmp_path / "exp")) == list(range(1, STEPS + 1))
    with open(tmp_path / "exp" / "curve.csv", newline="") as file:
        assert sum(bool(row["val_wer"]) for row in csv.DictReader(file)) == STEPS // 3
