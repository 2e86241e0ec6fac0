"""Probes of live models: each property broken by one honest mistake, and stock models that break none."""

import copy

import pytest

torch = pytest.importorskip("torch")

from omegaconf import OmegaConf
from torch import nn
from torch.nn import functional as F

from tests.recipes import tiny
from tools.doctor.engine import examine

WIDTH = 32
FAMILIES = ["outputs", "features", "lengths", "labels", "loss", "gradients", "weights", "locality", "neighbours", "invariance",
            "depth"]
SHORT = "nemo.collections.asr.modules."


def config(encoder: str = "conformer", **changes):
    """A small stock configuration; `changes` by dotted keys with __ for the dot."""
    cfg = tiny.config(features=WIDTH)
    cfg.spec_augment.time_masks = 2
    common = dict(feat_in=WIDTH, d_model=WIDTH, subsampling="striding", subsampling_factor=4,
                  subsampling_conv_channels=8, n_layers=2, dropout=0.1)
    if encoder == "conformer":
        cfg.encoder = OmegaConf.create(dict(_target_=SHORT + "ConformerEncoder", n_heads=4, conv_kernel_size=9,
                                            ff_expansion_factor=2, **common))
    elif encoder == "rnn":
        cfg.encoder = OmegaConf.create(dict(_target_=SHORT + "RNNEncoder", rnn_type="lstm", bidirectional=False,
                                            proj_size=16, **common))
    cfg.decoder.feat_in = None
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    return cfg


def stock(encoder: str = "conformer", seed: int = 0, **changes):
    from nemo.collections.asr.models import EncDecCTCModel

    torch.manual_seed(seed)
    return EncDecCTCModel(config(encoder, **changes))


def probe(model, families=FAMILIES):
    return examine(model=model, families=families, seconds=120)


# ---- healthy -----------------------------------------------------------------------------------------------


def state(model):
    return ({k: v.clone() for k, v in model.state_dict().items()}, [m.training for m in model.modules()],
            [(p.requires_grad, p.grad) for p in model.parameters()], torch.get_rng_state(),
            sorted(vars(model)), vars(model).get("_optimizer"))


@pytest.mark.parametrize("encoder", ["conformer", "rnn", "conv"])
def test_stock_models_have_nothing_that_prevents_learning_and_are_left_alone(encoder):
    model = stock(encoder).train()
    model.encoder.eval()  # a mixture of modes is kept too
    for p in list(model.parameters())[:1]:
        p.grad = torch.ones_like(p)
    before = state(model)
    report = probe(model)
    after = state(model)
    assert report.exit_code == 0, report.findings
    assert all("needs manifests" in line for line in report.not_examined), report.not_examined
    assert {"time-scrambled", "batch-leak", "blank-index", "no-gradient", "loss-wrong"} <= set(report.ruled_out)
    assert before[1] == after[1] and before[4] == after[4] and before[5] is after[5]
    assert all(torch.equal(value, after[0][key]) for key, value in before[0].items())
    assert all(a[0] == b[0] and a[1] is b[1] for a, b in zip(before[2], after[2]))
    assert torch.equal(before[3], after[3])


SMALL = ["size.deepspeech.hidden=32", "size.deepspeech.rnn_hidden=24", "size.deepspeech2.rnn_hidden=24",
         "size.deepspeech2.rnn_layers=2", "size.conformer.d_model=32", "size.conformer.n_layers=2",
         "size.conformer.subsampling_conv_channels=8"]


@pytest.mark.parametrize("recipe", ["deepspeech", "deepspeech2", "conformer"])
def test_our_recipes_leak_nothing(recipe):
    from tools.doctor.configs import load_config
    from tools.doctor.opening import build

    report = probe(build(load_config(recipe, SMALL)))
    assert [f for f in report.findings if f.weight != "note"] == []
    assert all("needs manifests" in line for line in report.not_examined), report.not_examined


# ---- faults ------------------------------------------------------------------------------------------------


class Around(nn.Module):
    """An encoder with something done to what goes in or comes out."""

    def __init__(self, model, change):
        super().__init__()
        self.inner, self.change, self._feat_in = model.encoder, change, WIDTH

    def forward(self, audio_signal, length):
        return self.change(self, audio_signal, length)


def around(change, **kwargs):
    model = stock(**kwargs)
    model.encoder = Around(model, change)
    return model


def after(change):
    """`change` of (outputs (B, D, T), lengths)."""
    return lambda: around(lambda self, x, n: change(*self.inner(audio_signal=x, length=n)))


def decoder(change):
    """The decoder's scores (B, T, V+1), through `change` in place of log_softmax."""
    def make():
        model = stock()
        layers = model.decoder.decoder_layers
        model.decoder.forward = lambda encoder_output: change(layers(encoder_output).transpose(1, 2))
        return model

    return make


def recurrent(**kwargs):
    def make():
        model = stock()
        model.encoder = Around(model, lambda self, x, n: self.step(*self.inner(audio_signal=x, length=n)))
        kind = kwargs.pop("kind", nn.GRU)
        model.encoder.rnn = kind(WIDTH, WIDTH, **kwargs)
        model.encoder.step = lambda y, n: (model.encoder.rnn(y.transpose(1, 2))[0].transpose(1, 2), n)
        return model

    return make


def with_loss(change):
    def make():
        model = stock()
        own = model.loss.forward
        model.loss.forward = lambda log_probs, targets, input_lengths, target_lengths: own(
            **change(log_probs=log_probs, targets=targets, input_lengths=input_lengths, target_lengths=target_lengths))
        return model

    return make


def with_features(change):
    def make():
        model = stock()
        own = model.preprocessor.forward

        def forward(input_signal, length):
            return change(*own(input_signal=input_signal, length=length))

        model.preprocessor.forward = forward
        return model

    return make


def edited(edit, **kwargs):
    def make():
        model = stock(**kwargs)
        with torch.no_grad():
            edit(model)
        return model

    return make


def blank_first(model):
    from nemo.collections.asr.losses.ctc import CTCLoss

    model.loss = CTCLoss(num_classes=0, zero_infinity=True)


def decoder_left_out(model):
    model._optimizer = torch.optim.AdamW(model.encoder.parameters(), lr=1e-3)


def slow_statistics(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = 0.0


def unstable(model):
    nn.init.eye_(model.encoder.rnn.weight_hh_l0).mul_(1.2)


def unstable_recurrence():
    model = recurrent(kind=nn.RNN, nonlinearity="relu", batch_first=True)()
    with torch.no_grad():
        unstable(model)
    return model


def fading(model):
    for module in model.encoder.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.weight.mul_(1e-4)


def only_padding(y, n):
    """(B, D, T), to each frame the mean over what the mask leaves: padding, or all where there is none."""
    padding = torch.arange(y.shape[2], device=y.device)[None] >= n[:, None]
    weight = (padding + 1e-6)[:, None].to(y)
    wave = torch.cos(torch.arange(y.shape[2]) / 3.0)
    return y + 3 * (wave * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True)


def own_norm(self, x, n):
    return self.inner(audio_signal=(x - x.mean(2, keepdim=True)) / (x.std(2, keepdim=True) + 1e-5), length=n)


def encoder_at_another_rate(model):
    groups = [{"params": list(model.encoder.parameters()), "lr": 1e-8}, {"params": list(model.decoder.parameters())}]
    model._optimizer = torch.optim.AdamW(groups, lr=1e-3)


def half_turned(self, x, n):
    """Two directions of which the second is not turned back."""
    ahead, back = (self.inner(audio_signal=v, length=n) for v in (x, x.flip(2)))
    return torch.cat([ahead[0][:, : WIDTH // 2], back[0][:, WIDTH // 2 :]], dim=1), ahead[1]


FAULTS = {
    "batch-leak: a recurrence over the batch": ("batch-leak", recurrent()),
    "batch-leak: statistics of the batch": ("batch-leak", lambda: around(
        lambda self, x, n: self.inner(audio_signal=x - x.mean(0, keepdim=True), length=n))),
    "time: reshape for transpose": ("time-scrambled", after(
        lambda y, n: (y.reshape(y.shape[0], y.shape[2], y.shape[1]).transpose(1, 2), n))),
    "time: flipped": ("time-scrambled", after(lambda y, n: (y.flip(2), n))),
    "time: one direction flipped": ("time-scrambled", lambda: around(half_turned)),
    "time: pooled": ("time-scrambled", after(lambda y, n: (y.mean(2, keepdim=True).expand_as(y) + 0 * y, n))),
    "time: features flipped": ("time-scrambled", with_features(lambda x, n: (x.flip(2), n))),
    "lengths not shortened": ("length-mismatch", lambda: around(
        lambda self, x, n: (self.inner(audio_signal=x, length=n)[0], n))),
    "lengths shortened twice": ("length-mismatch", after(lambda y, n: (y, n // 2))),
    "lengths ignored": ("length-ignored", lambda: around(
        lambda self, x, n: self.inner(audio_signal=x, length=torch.full_like(n, x.shape[2])))),
    "raw scores": ("not-log-probs", decoder(lambda s: s)),
    "probabilities": ("not-log-probs", decoder(lambda s: s.softmax(-1))),
    "softmax twice": ("not-log-probs", decoder(lambda s: s.softmax(-1).log_softmax(-1))),
    "clamped": ("not-log-probs", decoder(lambda s: s.log_softmax(-1).clamp(min=-5))),
    "a blank that is held down": ("blank-index", decoder(
        lambda s: torch.cat([s[..., :-1], s[..., -1:] - 30], dim=-1).log_softmax(-1))),
    "front end that counts a longer hop": ("length-mismatch", with_features(lambda x, n: (x, n * 4 // 5))),
    "front end that masks the end": ("length-mismatch", with_features(
        lambda x, n: (x * (torch.arange(x.shape[2]) < 0.8 * x.shape[2]), n))),
    "encoder at a rate of its own": ("lr-too-low", edited(encoder_at_another_rate)),
    "a mask upside down": ("padding-leak", lambda: around(
        lambda self, x, n: (lambda y, m: (only_padding(y, m), m))(*self.inner(audio_signal=x, length=n)))),
    "softmax over time": ("softmax-axis", decoder(lambda s: s.log_softmax(1))),
    "softmax over the batch": ("softmax-axis", decoder(lambda s: s.log_softmax(0))),
    "constant": ("output-constant", after(lambda y, n: (y * 0, n))),
    "detached": ("no-gradient", after(lambda y, n: (y.detach(), n))),
    "frozen": ("frozen", edited(lambda m: m.encoder.requires_grad_(False))),
    "decoder not in the optimizer": ("not-in-optimizer", edited(decoder_left_out)),
    "blank first in the loss": ("blank-index", edited(blank_first)),
    "other labels in training": ("label-order", lambda: stock(labels=[*"abcdefghijklmnopqrstuvwxyz", "'", " "])),
    "loss of shorter inputs": ("loss-wrong", with_loss(lambda **k: {**k, "input_lengths": k["input_lengths"] // 2})),
    "loss of shifted targets": ("loss-wrong", with_loss(lambda **k: {**k, "targets": (k["targets"] + 1) % 28})),
    "scale in training": ("train-eval-differ", lambda: around(
        lambda self, x, n: (lambda y, m: (y * (3.0 if self.training else 1.0), m))(
            *self.inner(audio_signal=x, length=n)))),
    "statistics that stay": ("train-eval-differ", edited(slow_statistics, encoder="conv")),
    "own dropout unscaled": ("train-eval-differ", lambda: around(
        lambda self, x, n: (lambda y, m: (y * (torch.rand_like(y) > 0.6) if self.training else y, m))(
            *self.inner(audio_signal=x, length=n)))),
    "dropout that is always on": ("train-eval-differ", after(lambda y, n: (F.dropout(y, 0.3), n))),
    "features of the batch": ("batch-leak", with_features(lambda x, n: (x - x.mean(0, keepdim=True), n))),
    "normalisation over padding": ("norm-padding", lambda: around(own_norm)),
    "attention sees padding": ("padding-leak", lambda: around(
        lambda self, x, n: (self.inner(audio_signal=x, length=torch.full_like(n, x.shape[2]))[0], (n + 3) // 4))),
    "explosion in time": ("explodes", unstable_recurrence),
    "a recurrence without bound": ("explodes", recurrent(kind=nn.RNN, nonlinearity="relu", batch_first=True)),
    "fading": ("vanishes", edited(fading, encoder="conv")),
    "features NaN": ("features-bad", with_features(lambda x, n: (x.log(), n))),
    "features constant": ("features-bad", with_features(lambda x, n: (x * 0 + 1, n))),
    "features too large": ("features-bad", with_features(lambda x, n: (x * 1000, n))),
    "dither of integers": ("features-bad", lambda: stock(preprocessor__dither=1.0)),
    "masks over everything": ("augmentation-too-strong", lambda: stock(
        spec_augment__time_masks=20, spec_augment__time_width=0.2)),
    "widths that do not fit": ("model-does-not-build", lambda: stock(encoder__feat_in=WIDTH * 2)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_mistake_is_named_first(name):
    assert_named_first(*FAULTS[name])


def assert_named_first(fault, make):
    report = probe(make())
    seen = [(f.weight, f.id, round(f.confidence, 2), f.symptom) for f in report.findings]
    assert report.ids and report.ids[0] == fault, seen
    assert report.findings[0].fix and report.findings[0].cause


def test_a_recurrence_that_is_bounded_is_no_fault():
    report = probe(recurrent(batch_first=True)(), ["depth", "invariance", "locality"])
    assert report.exit_code == 0 and "explodes" in report.ruled_out


def test_wide_convolutions_blur_time_and_do_not_scramble_it():
    def block(kernel, stride=1, residual=True):
        return {"filters": 32, "repeat": 5, "kernel": [kernel], "stride": [stride], "dilation": [1], "dropout": 0.0,
                "residual": residual, "separable": True}

    cfg = config("conv")
    cfg.encoder.feat_in = WIDTH
    cfg.encoder.jasper = [{**block(33, 2, False), "repeat": 1}, *(block(k) for k in (33, 39, 51, 63, 75) for _ in "ab")]
    cfg.decoder.feat_in = 32
    from nemo.collections.asr.models import EncDecCTCModel

    torch.manual_seed(0)
    assert "time-scrambled" not in probe(EncDecCTCModel(cfg), ["locality"]).ids


def test_the_first_module_that_breaks_is_named():
    model = stock("conv")
    with torch.no_grad():
        model.encoder.encoder[1].mconv[0].conv.weight.fill_(float("nan"))
    found = probe(model, ["outputs"]).findings[0]
    assert found.id == "explodes" and found.where == "encoder.encoder.1.mconv.0.conv"
    assert found.evidence["parameters and statistics not finite"] == ["encoder.encoder.1.mconv.0.conv.weight"]


def test_targets_that_do_not_fit_are_counted_exactly(tmp_path):
    rows = tiny.corpus(tmp_path, seconds=(1.0, 1.0, 1.0))
    model = stock()  # 100 feature frames, 25 or 26 of the output
    from tools.doctor.lengths import length_rule
    from tools.doctor.subject import Subject

    subject = Subject(model=model)
    subject.open()
    with torch.no_grad():
        rule = length_rule(subject.probe)
        for frames in (57, 101, 433):
            x, n = subject.probe.made_up_features([frames])
            assert rule(frames) == int(subject.probe.forward(x, n)[1][0])
    room = rule(int(model.preprocessor.featurizer.get_seq_len(torch.tensor([16000]))))
    rows[0]["text"], rows[1]["text"], rows[2]["text"] = "ab" * (room // 2), "a" * (room // 2 + 2), "a" * (room // 2)
    path = str(tiny.write_rows(tmp_path / "t.json", rows))
    found = examine(model=model, manifests={"train": path}, families=["lengths"]).findings
    assert [(f.id, f.evidence["utterances"], f.weight) for f in found] == [("data-target-too-long", 1, "prevents")]
    assert "t.json:2" in found[0].symptom  # of n equal letters 2 n - 1 frames are needed


def test_texts_of_the_manifest_go_the_way_of_training(tmp_path):
    path = str(tiny.write_rows(tmp_path / "t.json", tiny.corpus(tmp_path)))
    model = stock()
    assert "label-order" in examine(model=model, manifests={"train": path}, families=["labels"]).ruled_out
    loud = [{**row, "text": row["text"].upper()} for row in tiny.corpus(tmp_path)]
    cleaned = stock(train_ds={"manifest_filepath": path, "sample_rate": 16000, "batch_size": 2,
                              "normalize_transcripts": True, "defer_setup": True})
    report = examine(model=cleaned, manifests={"train": str(tiny.write_rows(tmp_path / "u.json", loud))},
                     families=["data", "labels", "lengths"])
    assert {"label-order", "tokenizer-vocabulary", "data-upper-case"} <= set(report.ruled_out)
    assert "data-target-too-long" in report.ids  # 0.4 s for 18 letters; without cleaning only the spaces are targets
    marked = [{**row, "text": f"{row['text']}, 1st."} for row in tiny.corpus(tmp_path)]
    report = examine(model=model, manifests={"train": str(tiny.write_rows(tmp_path / "m.json", marked))},
                     families=["data", "labels"])
    assert [(f.id, f.weight) for f in report.findings] == [("data-characters", "warning")]
    model.decoding.labels_map = {i: label for i, label in enumerate(reversed(model.decoder.vocabulary))} if isinstance(
        model.decoding.labels_map, dict) else list(reversed(model.decoder.vocabulary))
    assert examine(model=model, manifests={"train": path}, families=["labels"]).ids == ["label-order"]


def test_gradients_held_by_a_live_model_survive():
    model = stock("conv")
    gradients = [torch.full_like(p, 2.0) for p in model.parameters()]
    for p, g in zip(model.parameters(), gradients):
        p.grad = g
    probe(model, ["gradients", "depth"])
    assert all(p.grad is g and bool((g == 2).all()) for p, g in zip(model.parameters(), gradients))


def test_a_subclass_with_its_own_schedule_a_step_an_epoch():
    from nemo.collections.asr.models import EncDecCTCModel

    class Own(EncDecCTCModel):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 500, 1))]

    cfg = copy.deepcopy(config("conv"))
    cfg.optim = {"name": "adamw", "lr": 1e-3, "sched": {"name": "CosineAnnealing", "warmup_steps": 500}}
    report = examine(model=Own(cfg), families=["schedule", "gradients"])
    assert report.ids[0] == "schedule-per-epoch" and "not-in-optimizer" in report.ruled_out
