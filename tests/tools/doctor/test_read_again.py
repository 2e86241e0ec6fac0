"""What a reading of the doctor's own code found: verdicts that did not hold for precisions, languages, loaders and resumed
runs of others, each with the fault beside it that is still told."""

import json
import math
import random
import time
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from omegaconf import OmegaConf

from tests.tools.doctor.runs import Plain, loader, tones, write_curve
from tools.doctor import checkpoints, devices, labels, lengths, logs
from tools.doctor.callback import Doctor
from tools.doctor.configs import load_config
from tools.doctor.delivered import plain
from tools.doctor.engine import examine
from tools.doctor.explain import read_run
from tools.doctor.live import rate_kept
from tools.doctor.probe import Item, Probe
from tools.doctor.registry import NotExamined
from tools.doctor.run import overfitting, progress
from tools.doctor.subject import Subject
from tools.doctor.trace import LETTERS_ONLY, Trace, shape


def told(findings) -> list[tuple[str, str]]:
    return [(finding.id, finding.weight) for finding in findings]


def trace_with(steps=4000, every=10, **series) -> Trace:
    """A trace of functions of the step; None leaves a step out."""
    trace = Trace(loss_unit="character", ended=True, planned=steps)
    for name, value in series.items():
        trace.series[name] = [(s, value(s)) for s in range(every, steps + 1, every) if value(s) is not None]
    return trace


# ---- precision and memory --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    from tests.tools.doctor.setups import live

    return live(tmp_path_factory.mktemp("healthy"), "conformer")


def test_a_model_in_half_precision_is_probed_as_it_is_computed_in_full(healthy):
    model = healthy["model"].bfloat16()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = examine(**healthy, families=["lengths", "invariance"], seconds=120)
    assert set(report.ids) <= {"norm-padding"} and report.exit_code == 0, report.findings  # as in full precision
    assert not [line for line in report.not_examined if "Error" in line]
    assert {"length-mismatch", "batch-leak", "padding-leak", "model-does-not-build"} <= set(report.ruled_out)
    after = model.state_dict()
    assert all(after[name].dtype == value.dtype and torch.equal(after[name], value) for name, value in before.items())
    model.float()


@pytest.mark.parametrize("fails, said", [
    (lambda frames: RuntimeError("mat1 and mat2 must have the same dtype"), "no usual utterance passes either"),
    (lambda frames: torch.OutOfMemoryError("CUDA out of memory") if frames > 500 else None, "no memory for the longest"),
    (lambda frames: RuntimeError("size of tensor a must match") if frames > 500 else None, None)])
def test_only_what_hangs_on_the_length_is_a_fault_of_lengths(monkeypatch, fails, said):
    monkeypatch.setattr(lengths, "_fails", lambda probe, frames: fails(frames))
    rows = [{"duration": seconds, "text": "a", "_at": "train.json:1"} for seconds in (1.0, 2.0, 9.0)]
    model = SimpleNamespace(preprocessor=None)
    subject = SimpleNamespace(probe=SimpleNamespace(model=model, sample_rate=16000), settings=None, rows={"train": rows})
    if said is None:
        assert told(lengths.every_length_passes(subject)) == [("model-does-not-build", "prevents")]
    else:
        with pytest.raises(NotExamined, match=said):
            list(lengths.every_length_passes(subject))


def test_an_encoder_of_several_contexts_is_asked_in_one_of_them():
    from tests.tools.doctor.test_model_probes import stock

    contexts = [[8, 4], [8, 0], [2, 0]]
    model = stock(encoder__att_context_size=contexts)
    probe, drawn, held = Probe(model, Subject(model=model), own=False), [], random.getstate()
    for _ in range(2):
        with probe.ready(train=True), torch.no_grad():
            assert model.encoder.att_context_size_all == contexts[:1]
            probe.forward(*probe.features())  # draws with the one probability that is left
            drawn.append(random.random())
    assert drawn[0] == drawn[1] and random.getstate() == held
    assert model.encoder.att_context_size_all == contexts and len(model.encoder.att_context_probs) == 3


# ---- languages -------------------------------------------------------------------------------------------------


def texts_of(alphabet: str, count: int = 400, size: int = 14, spaces: bool = False, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    weights = [1 / (k + 5) for k in range(len(alphabet))]
    rows = ["".join(draw.choices(alphabet, weights, k=size)) for _ in range(count)]
    return [" ".join(row[i : i + 4] for i in range(0, size, 4)) for row in rows] if spaces else rows


CHINESE = "".join(chr(0x4E00 + k) for k in range(1500))


@pytest.mark.parametrize("alphabet, loss, learned", [
    (CHINESE, 6.0, False), (CHINESE, 3.2, True), ("0123456789", 2.2, False), ("0123456789", 0.5, True)])
def test_the_level_is_that_of_the_texts_own_letters(tmp_path, alphabet, loss, learned):
    settings = load_config({"model": {"labels": list(alphabet), "optim": {"name": "adamw", "lr": 1e-3}},
                            "trainer": {"max_steps": 2000}})
    rows = [{"step": s, "loss_per_char": loss if s > 300 else max(loss, 6.0)} for s in range(10, 2001, 10)]
    folder = write_curve(tmp_path / "run", rows)
    trace = read_run(folder, settings, lambda: [{"text": text} for text in texts_of(alphabet)])
    curve = shape(trace)
    assert (curve.learned, curve.stuck) == (learned, not learned) and trace.level != LETTERS_ONLY
    assert trace.counts_sentences


def test_without_texts_the_level_is_that_of_english(tmp_path):
    folder = write_curve(tmp_path / "run", [{"step": s, "loss_per_char": 2.86} for s in range(10, 2001, 10)])
    assert shape(read_run(folder)).level == LETTERS_ONLY
    capitals = [{"text": text.upper()} for text in texts_of("abcdefgh", spaces=True)]  # nothing but the spaces are labels
    settings = load_config({"model": {"labels": list(" abcdefgh")}})
    assert shape(read_run(folder, settings, lambda: capitals)).level == LETTERS_ONLY


@pytest.mark.parametrize("share, stuck", [(1.0, True), (0.4, False)])
def test_a_run_of_tokens_is_judged_by_its_loss(tmp_path, share, stuck):
    import sentencepiece

    texts = texts_of("etaoinshrdlu", count=600, size=24, spaces=True)
    (tmp_path / "texts").write_text("\n".join(texts))
    sentencepiece.SentencePieceTrainer.train(input=str(tmp_path / "texts"), model_prefix=str(tmp_path / "tokenizer"),
                                             vocab_size=60, minloglevel=2)
    settings = load_config({"model": {"tokenizer": {"dir": str(tmp_path), "type": "bpe"}}, "trainer": {"max_steps": 3000}})
    folder = tmp_path / "run"
    folder.mkdir()
    loss = share * 14 * 3.6  # about as many tokens a text, nats a token
    lines = ["step,train_loss"] + [f"{s},{loss}" for s in range(10, 3001, 10)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    trace = read_run(folder, settings, lambda: [{"text": text} for text in texts])
    assert trace.loss_unit == "label" and 3.0 < trace.level < 4.1
    trace.series["loss"] = [(s, share * trace.level) for s, _ in trace.series["loss"]]
    assert shape(trace).stuck == stuck
    assert bool(progress(trace)) == stuck


def unknown_unit(steps: int) -> Trace:
    trace = trace_with(steps, 50, loss=lambda s: 60.0, val_wer=lambda s: 1.0 if s % (steps // 12) == 0 else None)
    trace.loss_unit = "unknown"
    return trace


@pytest.mark.parametrize("steps, weight", [(4800, "warning"), (24000, "prevents")])
def test_no_word_right_for_very_long_prevents(steps, weight):
    assert told(progress(unknown_unit(steps))) == [("run-plateau", weight)]


def test_no_sentence_right_says_nothing_of_the_words():
    trace = unknown_unit(24000)
    trace.spaces = 0.0
    with pytest.raises(NotExamined, match="use_cer=true"):
        progress(trace)


@pytest.mark.parametrize("more, found", [
    (dict(val_loss=4.0), True), (dict(val_loss=4.0, spaces=0.0), False), (dict(val_loss=0.5), False),
    (dict(val_cer=0.15), False), (dict(val_cer=0.8), True), ({}, True)])
def test_by_heart_only_where_the_validation_is_not_learned(more, found):
    trace = trace_with(1000, 10, loss=lambda s: 3 * math.exp(-s / 150), val_wer=lambda s: 0.95 if s % 200 == 0 else None)
    trace.spaces = more.pop("spaces", 0.18)
    for name, value in more.items():
        trace.series[name] = [(s, value) for s in range(200, 1001, 200)]
    try:
        assert told(overfitting(trace)) == [("run-overfitting", "warning")] * found
    except NotExamined:
        assert not found


def test_texts_that_a_tokenizer_normalises_are_the_same():
    assert labels._plain("Straße １２ ﬁn") == labels._plain("strasse 12 fin")
    assert plain("Straße １２  ﬁn") == "strasse 12 fin" != plain("strasse 12 fun")


def test_a_tokenizer_of_several_languages_is_given_the_rows(monkeypatch):
    kinds = {"en": 0, "de": 100}
    tokenizer = SimpleNamespace(tokenizers_dict=kinds, text_to_ids=lambda text, lang: [kinds[lang] + len(text)])
    rows = {"train": [{"text": "yes", "lang": "en"}, {"text": "jawohl", "lang": "de"}, {"text": "oui"}]}
    probe = SimpleNamespace(model=SimpleNamespace(tokenizer=tokenizer), subject=SimpleNamespace(rows=rows), vocabulary=[])
    assert [labels.encode_text(probe, text) for text in ("yes", "jawohl")] == [[3], [106]]
    with pytest.raises(NotExamined, match="`lang` of the rows is not there"):
        labels.encode_text(probe, "oui")


# ---- audio to probe with ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds, real", [(30.0, 4), (0.3, 0)])
def test_long_utterances_are_cut_and_made_up_sound_is_told(tmp_path, seconds, real):
    import numpy as np
    import soundfile

    noise = 0.1 * np.random.default_rng(0).standard_normal(int(seconds * 16000))
    soundfile.write(tmp_path / "a.wav", noise, 16000)
    row = {"audio_filepath": str(tmp_path / "a.wav"), "text": "a word", "duration": seconds}
    (tmp_path / "train.json").write_text((json.dumps(row) + "\n") * 6)
    subject = Subject(manifests={"train": str(tmp_path / "train.json")})
    subject.open(["data"])
    probe = Probe(torch.nn.Linear(2, 2), subject)
    items = probe.items()
    assert len(items) == 4 and sum(bool(item.row) for item in items) == real
    assert all(len(item.audio) <= 6 * 16000 and item.text == "" for item in items)
    assert not real or len({len(item.audio) for item in items}) > 1
    subject = SimpleNamespace(probe=SimpleNamespace(items=lambda: items))
    if real:
        assert not list(lengths.real_sound(subject) or ())
    else:
        with pytest.raises(NotExamined, match="4 of 4 had to be made-up tones"):
            lengths.real_sound(subject)
    assert isinstance(items[0], Item)


# ---- configurations --------------------------------------------------------------------------------------------


def test_a_resolver_that_is_not_loaded_is_no_fault():
    from tests.tools.doctor.test_model_probes import config

    cfg = OmegaConf.create({"model": config()})
    cfg.model.encoder.n_layers = "${layers_of:small}"
    report = examine(config=cfg, families=["lengths"])
    assert not report.findings and any("${layers_of:...} is resolved by code that is not loaded" in line
                                       for line in report.not_examined)
    cfg.model.encoder.n_layers = "${model.nowhere}"  # a key that is not there is one
    assert told(examine(config=cfg, families=["lengths"]).findings) == [("model-does-not-build", "prevents")]


@pytest.mark.parametrize("listed, told", [(["_self_", {"model": "conformer"}], True), (["_self_"], False)])
def test_a_list_of_defaults_that_was_not_composed(listed, told):
    report = examine(config={"defaults": listed, "trainer": {"max_steps": 10}, "model": {"optim": {"lr": 1e-3}}},
                     families=["schedule"])
    assert any("`defaults:` (model: conformer) was not composed" in line for line in report.not_examined) == told


@pytest.mark.parametrize("start, lr, found", [("a.nemo", 1e-3, [("lr-too-high", "warning")]), ("a.nemo", 1e-4, []),
                                              (None, 1e-3, [])])
def test_the_rate_of_a_run_from_scratch_for_a_fine_tuning(start, lr, found):
    from tests.tools.doctor.test_schedule import config

    cfg = config(model__optim__lr=lr, model__optim__sched={"name": "CosineAnnealing", "warmup_steps": 5000})
    cfg.init_from_nemo_model = start
    assert told(examine(config=cfg, families=["schedule"]).findings) == found


# ---- how a run goes on and ends --------------------------------------------------------------------------------


def test_checkpoints_of_any_size_are_there(tmp_path, monkeypatch):
    torch.save({"state_dict": {"weight": torch.zeros(4000)}, "global_step": 5}, tmp_path / "large.ckpt")
    torch.save({"state_dict": {"weight": torch.zeros(4)}, "global_step": 1}, tmp_path / "small.ckpt")
    monkeypatch.setattr(checkpoints, "MOST_BYTES", 8000)
    assert len(checkpoints.find(tmp_path)) == 2
    subject = SimpleNamespace(run=tmp_path, seconds_left=lambda: 60.0)
    with pytest.raises(NotExamined, match="large.ckpt: left out"):
        list(checkpoints.weights_of_the_checkpoints(subject))
    for k in range(9):
        (tmp_path / f"{k}.ckpt").write_bytes(b"PK")
    assert len(checkpoints.find(tmp_path)) == 11 and len(checkpoints.chosen(checkpoints.find(tmp_path))[0]) == 6


@pytest.mark.parametrize("line, kind, fix", [
    ("slurmstepd: error: *** STEP 1.0 ON n1 CANCELLED AT 2025-01-01T00:00:00 DUE TO TIME LIMIT ***", "time limit", "again"),
    ("slurmstepd: error: Detected 1 oom_kill event. Some of the step tasks have been OOM Killed.", "memory", "num_workers"),
    ("[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)", "waited", "other ranks"),
    ("RuntimeError: DataLoader worker (pid 7) is killed by signal: Bus error.", "shared memory", "--shm-size")])
def test_ways_in_which_a_queue_ends_a_run(tmp_path, line, kind, fix):
    (tmp_path / "run.log").write_text(f"Epoch 1\n{line}\n")
    trace = Trace()
    logs.read_logs(tmp_path, trace)
    (_, said), = trace.messages
    assert kind in said
    assert fix in logs.run_ended(10, 100, "", said, {}, 0.8, ["start it again"]).fix[0]


@pytest.mark.parametrize("section, key", [
    ({"training": {"global_batch_seconds": 600}, "model": {"train_ds": {"batch_duration": None}}},
     "training.global_batch_seconds"),
    ({"model": {"train_ds": {"batch_size": 16}}}, "model.train_ds.batch_size"),
    ({"model": {"train_ds": {"batch_duration": 300, "batch_size": None}}}, "model.train_ds.batch_duration")])
def test_a_smaller_batch_is_named_as_the_configuration_has_it(section, key):
    found = logs.run_ended(10, 100, "", "CUDA out of memory", {}, 0.8, [], load_config(section))
    assert found.fix[0].startswith(f"a smaller {key}, ")


def trainer_of(folder, steps: int, doctor):
    import lightning.pytorch as pl

    return pl.Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=folder,
                      enable_progress_bar=False, enable_model_summary=False, callbacks=[doctor])


def test_a_run_that_was_done_before_it_went_on_is_told(tmp_path):
    model, data, doctor = Plain(torch.nn.Linear(16, 16), 16), loader(tones(32)), Doctor(folder=tmp_path / "first")
    first = trainer_of(tmp_path, 3, doctor)
    first.fit(model, data)
    first.save_checkpoint(tmp_path / "last.ckpt")
    assert "run-ended" not in doctor.report().ids
    again = Doctor(folder=tmp_path / "first")
    before = (tmp_path / "first" / "doctor" / "report.json").read_bytes()
    trainer_of(tmp_path, 3, again).fit(model, data, ckpt_path=tmp_path / "last.ckpt")
    found, = again.report().findings
    assert (found.id, found.weight) == ("run-ended", "warning") and "trainer.max_steps=3 is reached" in found.symptom
    assert (tmp_path / "first" / "doctor" / "report.json").read_bytes() == before  # that of what was trained
    fresh = Doctor(folder=tmp_path / "second")
    trainer_of(tmp_path, 3, fresh).fit(model, data, ckpt_path=tmp_path / "last.ckpt")
    assert (tmp_path / "second" / "doctor" / "report.json").is_file()


@pytest.mark.parametrize("step, kept, found", [
    (100, 1e-3, []), (100, 1e-2, [("lr-too-high", "warning")]), (100, 1e-4, [("lr-too-low", "warning")]), (0, 1e-2, [])])
def test_a_rate_that_the_checkpoint_brings_with_it(step, kept, found):
    from nemo.core.classes import ModelPT

    class Model:
        configure_optimizers = ModelPT.configure_optimizers

    optimizer = SimpleNamespace(param_groups=[{"lr": 1e-6, "initial_lr": kept}])
    trainer = SimpleNamespace(global_step=step, lightning_module=Model(), optimizers=[optimizer],
                              lr_scheduler_configs=[])
    trace = Trace(settings=load_config({"model": {"optim": {"name": "adamw", "lr": 1e-3}}}))
    assert told(rate_kept(trainer, trace)) == found
    Model.configure_optimizers = lambda self: None  # one's own
    assert rate_kept(trainer, trace) == []


@pytest.mark.parametrize("batches, found", [
    (([3, 7, 9], [9, 3, 7]), [("data-duplicates", "warning")]), (([3, 7, 9], [9, 3, 8]), []), (([5, 5], [5, 5]), []),
    (([], []), [])])
def test_devices_that_hear_the_same(batches, found):
    every = [devices.facts(Trace(first_batch=keys), [], 0.0) for keys in batches]
    assert told(devices.joined([], every, 0)) == found


def test_keys_of_a_batch_are_for_several_devices():
    from tools.doctor.drawn import first_of

    batch = torch.zeros(2, 5), torch.tensor([5, 5]), torch.tensor([[1, 2, 3], [1, 2, 9]]), torch.tensor([3, 2])
    assert first_of(SimpleNamespace(world_size=1), batch) == []
    keys = first_of(SimpleNamespace(world_size=2), batch)
    assert len(set(keys)) == 2 and first_of(SimpleNamespace(world_size=2), {"audio": 1}) == []
    assert first_of(SimpleNamespace(world_size=2), (*batch[:3], torch.tensor([3]))) == []  # somebody's own batch


def test_on_several_devices_it_is_said_that_the_model_is_not_probed(tmp_path):
    doctor = Doctor(folder=tmp_path)
    doctor.trace = trace_with(3000, 10, loss=lambda s: 2.86)
    doctor._followed = SimpleNamespace(moved=SimpleNamespace(close=lambda: None), lines=([], []))
    doctor.pace.begun = time.perf_counter()
    doctor._finish(SimpleNamespace(world_size=2, is_global_zero=True, global_rank=0))
    assert devices.NOT_PROBED in doctor.report().not_examined and "run-plateau" in doctor.report().ids


def test_waiting_is_measured_from_batch_to_batch(monkeypatch):
    from tools.doctor.pace import Waits

    now = [0.0]
    monkeypatch.setattr("tools.doctor.pace.time", SimpleNamespace(perf_counter=lambda: now[0]))
    waits, trace = Waits(), Trace()
    for step in range(1, 5):
        waits.begins(now[0])
        now[0] += 3.0
        waits.ends(now[0], trace, step, 3)
        waits.rests(True)
        now[0] += 1.0
    assert trace.series["wait"] == [(4, 0.25)]  # of the first batch nothing is known
