"""The probe of a training step: steps that train on other views of a batch, and steps that spoil it."""

import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional as F

from tests.recipes import tiny
from tests.tools.doctor.test_model_probes import SMALL, stock
from tools.doctor.engine import examine

INNER = ["++model.interctc.loss_weights=[0.3]", "++model.interctc.apply_at_layers=[1]"]


def recipe(name, *overrides):
    from tools.doctor.configs import load_config
    from tools.doctor.opening import build

    return build(load_config(name, [*SMALL, *overrides]))


def probe(model, families=("loss", "gradients")):
    return examine(model=model, families=families, seconds=120)


@pytest.mark.parametrize("name, overrides", [
    ("deepspeech", ["model.consistency_weight=0.2"]),
    ("deepspeech2", ["model.tempo=0.1"]),
    ("deepspeech2", ["model.consistency_weight=0.2", "model.tempo=0.2", "model.spec_augment.warp=0.1"]),
    ("conformer", INNER),
    ("conformer_bpe", INNER),
    ("deepspeech2", ["++model.interctc.loss_weights=[0.3]", "++model.interctc.apply_at_layers=[0]"]),
    ("deepspeech2", ["model.noise_and_rooms.room_probability=1", "model.noise_and_rooms.noise_probability=1",
                     "model.noise_and_rooms.snr_db=[0,5]", "model.train_ds.cache_features=false"]),
    ("conformer", ["model.consistency_weight=0.2", "model.tempo=0.1", *INNER]),
])
def test_the_switches_of_our_recipes_are_no_fault(name, overrides, tmp_path):
    if name.endswith("_bpe"):
        tiny.bpe_config(tmp_path)
        overrides = [*overrides, f"model.tokenizer.dir={tmp_path}"]
    report = probe(recipe(name, *overrides))
    assert [f for f in report.findings if f.weight != "note"] == []
    assert {"loss-wrong", "no-gradient", "not-in-optimizer"} <= set(report.ruled_out)
    assert report.not_examined == []


def stepping(change, name="conformer"):
    """NeMo's model with a training step of its own: `change(features, lengths, targets, sizes)` before the forward."""
    model = stock(name)

    def training_step(batch, batch_idx):
        audio, lengths, targets, sizes = batch
        x, lengths = model.preprocessor(input_signal=audio, length=lengths)
        x, lengths, targets, sizes, *after = change(x, lengths, targets, sizes)
        log_probs, frames, _ = model(processed_signal=x, processed_signal_length=lengths)
        if after:
            log_probs, frames = after[0](log_probs, frames)
        return {"loss": model.loss(log_probs=log_probs, targets=targets, input_lengths=frames, target_lengths=sizes)}

    model.training_step = training_step
    return model


def faster(x, lengths, targets, sizes):
    return F.interpolate(x, scale_factor=0.9), (lengths * 0.9).long(), targets, sizes


def thrice(x, lengths, targets, sizes):
    return tuple(torch.repeat_interleave(t, 3, dim=0) for t in (x, lengths, targets, sizes))


def quieter_with_noise(x, lengths, targets, sizes):
    return 0.9 * x + 0.1 * torch.randn_like(x), lengths, targets, sizes


@pytest.mark.parametrize("change", [faster, thrice, quieter_with_noise])
def test_a_step_of_ones_own_may_change_the_batch_as_long_as_all_goes_together(change):
    assert probe(stepping(change), ["loss"]).findings == []


def slower_with_the_old_lengths(x, lengths, targets, sizes):
    return F.interpolate(x, scale_factor=0.8), lengths.clamp(max=int(0.8 * x.shape[2])), targets, sizes


def views_in_two_orders(x, lengths, targets, sizes):
    return x.repeat(2, 1, 1), lengths.repeat(2), targets.repeat_interleave(2, dim=0), sizes.repeat_interleave(2)


def audio_of_other_rows(x, lengths, targets, sizes):
    return x.roll(1, 0), lengths.roll(1, 0), targets, sizes


def audio_of_other_rows_with_the_old_lengths(x, lengths, targets, sizes):
    return x.roll(1, 0), lengths, targets, sizes


def lengths_of_the_features(x, lengths, targets, sizes):
    return x, lengths, targets, sizes, lambda log_probs, frames: (log_probs, frames // 2)


def softmaxed(x, lengths, targets, sizes):
    return x, lengths, targets, sizes, lambda log_probs, frames: (2 * log_probs, frames)


@pytest.mark.parametrize("change, named", [
    (slower_with_the_old_lengths, "audio"), (views_in_two_orders, "targets"), (audio_of_other_rows, "audio"),
    (lengths_of_the_features, "input lengths"), (softmaxed, "log-probs"),
])
def test_what_does_not_go_together_prevents_learning(change, named):
    first = probe(stepping(change), ["loss"]).findings[0]
    assert (first.id, first.weight) == ("loss-wrong", "prevents") and named in first.evidence["given otherwise"], first


def test_other_audio_of_the_same_lengths_is_seen():
    """Of a fresh model the loss says nothing; that the outputs are those of other audio does."""
    first = probe(stepping(audio_of_other_rows_with_the_old_lengths), ["loss"]).findings[0]
    assert first.id == "loss-wrong" and "audio" in first.evidence["given otherwise"]
    flipped = probe(stepping(lambda x, n, t, s: (x.flip(2), n, t, s)), ["loss"]).findings
    assert [f.id for f in flipped] == ["loss-wrong"] and "audio" in flipped[0].evidence["given otherwise"]


def test_a_layer_within_that_is_given_other_targets_is_named():
    model = recipe("conformer", *INNER)
    own = model.add_interctc_losses
    model.add_interctc_losses = lambda loss, targets, sizes, **more: own(loss, targets.roll(1, 0), sizes, **more)
    first = probe(model, ["loss"]).findings[0]
    assert first.id == "loss-wrong" and first.weight == "prevents" and "targets" in first.evidence["given otherwise"]


@pytest.mark.parametrize("tempo, said", [(0.0, False), (0.02, False), (0.45, True)])
def test_targets_that_fit_only_until_the_audio_is_made_faster(tmp_path, tempo, said):
    from tests.recipes import tiny

    rows = [{**row, "text": row["text"] * 2} for row in tiny.corpus(tmp_path)]  # 36 letters in 1 s, 25 frames and up
    rows = [{**row, "text": row["text"][: int(22 * row["duration"])]} for row in rows]
    manifest = tiny.write_rows(tmp_path / "train.json", rows)
    overrides = [*SMALL, f"corpus.train={manifest}", f"corpus.validation={manifest}", f"model.tempo={tempo}"]
    report = examine(config="conformer", overrides=overrides, families=["lengths"])
    found = [f for f in report.findings if "fastest tempo" in f.symptom]
    assert bool(found) == said and all(f.weight == "warning" and f.where == "model.tempo" for f in found), found


def test_a_loss_of_many_numbers_is_named_and_the_rest_is_examined():
    report = probe(stock(ctc_reduction="none"))
    (finding,) = [f for f in report.findings if f.weight == "prevents"]
    assert finding.id == "loss-wrong" and "4 numbers" in finding.symptom and "ctc_reduction" in finding.where
    assert any("gets a gradient" in line for line in report.examined)


def test_a_hop_of_a_tenth_of_a_second_is_the_cause_and_the_only_one(tmp_path):
    from tests.tools.doctor.setups import models, tones

    cfg = models.recipe("conformer", preprocessor={**models.preprocessor(), "window_stride": 0.1})
    report = examine(config=cfg, manifests=tones.manifests(tmp_path), families=["lengths", "gradients"], seconds=120)
    (finding,) = [f for f in report.findings if f.weight == "prevents"]
    assert (finding.id, finding.where) == ("data-target-too-long", "model.preprocessor.window_stride")
    assert finding.fix[0].startswith("model.preprocessor.window_stride=0.01")


def adding(term, weight=1.0, **changes):
    """NeMo's model with a loss of `weight` times CTC and a term of the log-probs."""
    model = stock(**changes)

    def training_step(batch, batch_idx):
        audio, lengths, targets, sizes = batch
        log_probs, frames, _ = model(input_signal=audio, input_signal_length=lengths)
        loss = model.loss(log_probs=log_probs, targets=targets, input_lengths=frames, target_lengths=sizes)
        return {"loss": weight * loss + term(log_probs)}

    model.training_step = training_step
    return model


@pytest.mark.parametrize("reduction", ["mean_batch", "mean_volume"])
def test_another_term_is_told_apart_and_held_against_the_models_own_reduction(reduction):
    penalty = adding(lambda y: -2.0 * (y.exp() * y).sum(dim=-1).sum(dim=1).mean(), ctc_reduction=reduction)
    found = probe(penalty, ["loss"]).findings[0]
    assert (found.id, found.where) == ("loss-wrong", "training_step") and f"({reduction})" in found.symptom
    assert found.evidence["weight of CTC in it"] == pytest.approx(1.0) and found.evidence["the rest"] > 1
    assert found.cause.startswith("Another term is added to the CTC loss") and "alone first" in found.fix[0]


def test_a_term_that_outweighs_ctc_dominates():
    found = probe(adding(lambda y: 300 * y.exp().square().sum(dim=-1).mean(), 0.1), ["loss"]).findings[0]
    assert found.evidence["weight of CTC in it"] == pytest.approx(0.1, rel=1e-3)
    assert found.evidence["gradient of the rest by CTC's"] > 1 and "it dominates" in found.cause


@pytest.mark.parametrize("cut, returned", [(False, "detached"), (False, "nothing"), (False, "attached"), (True, "detached")])
def test_a_step_that_goes_backwards_by_itself_has_gradients(cut, returned):
    model = stock("conv")
    model.automatic_optimization = False

    def training_step(batch, batch_idx):
        audio, lengths, targets, sizes = batch
        x, lengths = model.preprocessor(input_signal=audio, length=lengths)
        encoded, frames = model.encoder(audio_signal=x, length=lengths)
        log_probs = model.decoder(encoder_output=encoded.detach() if cut else encoded)
        loss = model.loss(log_probs=log_probs, targets=targets, input_lengths=frames, target_lengths=sizes)
        optimizer = model.optimizers()
        optimizer.zero_grad()
        model.manual_backward(loss)
        model.clip_gradients(optimizer, 1.0, "norm")
        optimizer.step()
        model.lr_schedulers().step()
        return {"detached": loss.detach(), "nothing": None, "attached": loss}[returned]

    model.training_step = training_step
    report = probe(model, ["gradients", "loss"])
    assert ("no-gradient" in report.ids) is cut and all(p.grad is None for p in model.parameters())
    assert cut or not report.of_weight("prevents"), report.findings


def by_itself(shared, noise=0.02, weight=0.1):
    """A step that computes module by module, with noise on the audio and a reversed branch: on the output that CTC uses too
    (`shared`), or on its own."""
    model = stock()

    def training_step(batch, batch_idx):
        audio, lengths, targets, sizes = batch
        audio = audio + noise * torch.randn_like(audio)
        x, lengths = model.preprocessor(input_signal=audio, length=lengths)
        encoded, frames = model.encoder(audio_signal=x, length=lengths)
        branch = encoded if shared else encoded.clone()
        branch.register_hook(lambda gradient: -gradient)
        log_probs = model.decoder(encoder_output=encoded)
        loss = model.loss(log_probs=log_probs, targets=targets, input_lengths=frames, target_lengths=sizes)
        return {"loss": loss + weight * branch.mean(dim=-1).square().mean()}

    model.training_step = training_step
    return model


def test_a_gradient_that_is_reversed_on_a_shared_output():
    report = probe(by_itself(shared=True))
    first = report.findings[0]
    assert (first.id, first.weight) == ("step-uphill", "prevents") and first.where.startswith("encoder")
    assert "loss-wrong" not in report.ids
    own = probe(by_itself(shared=False))
    assert "step-uphill" in own.ruled_out and not own.of_weight("prevents"), own.findings
