"""Weights that are frozen on purpose, told from those that somebody forgot: live, by `check`, and in checkpoints."""

import math
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from torch import nn

from tests.tools.doctor.runs import FEATURES, Plain, fit, loader, speech, write_curve
from tests.tools.doctor.test_model_probes import WIDTH, config, stock
from tools.doctor.engine import examine
from tools.doctor.live import optimizer_findings
from tools.doctor.trained import look_trained


def front(norm=True):
    torch.manual_seed(0)
    layers = [nn.Linear(FEATURES, 128), nn.LayerNorm(128) if norm else nn.Identity(), nn.ReLU(), nn.Linear(128, 64)]
    return Plain(nn.Sequential(*layers), 64)


def stepped(model, steps=3):
    """The model after a few steps on anything, which is all that the gains of a trained one need to show."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(2, 20, FEATURES)).square().mean().backward()
        optimizer.step()
    return model


def heavy_tailed(model):
    """Matrices as training leaves them, a few values far beyond the rest."""
    for p in model.encoder.parameters():
        nn.init.normal_(p, std=0.05)
    return model


class Adapted(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.adapter_layer = inner, nn.ModuleDict({"mine": nn.Linear(64, 4)})

    def forward(self, x):
        y = self.inner(x)
        return y + self.adapter_layer["mine"](y).repeat(1, 1, 16)


def adapted(model):
    model.encoder = Adapted(model.encoder)
    return model


def frozen(model, inner=None):
    (inner or model.encoder).requires_grad_(False)
    return model


@pytest.mark.parametrize("make, weight, words", [
    (lambda: frozen(front()), "prevents", "as they were drawn"),
    (lambda: frozen(front(norm=False)), "prevents", "as they were drawn"),
    (lambda: frozen(stepped(front())), "warning", "gains of their normalisations differ"),
    (lambda: frozen(heavy_tailed(front(norm=False))), "warning", "Nothing in them says"),
    (lambda: (lambda m: frozen(m, m.encoder.inner))(adapted(front())), "warning", "adapters are trained"),
])
def test_a_frozen_encoder_of_a_live_run(make, weight, words):
    model = make()
    found = optimizer_findings(SimpleNamespace(optimizers=[model.configure_optimizers()]), model)
    assert [(f.id, f.weight) for f in found] == [("frozen", weight)] and words in found[0].cause
    assert found[0].evidence["share of all values"] > 0.9


def test_a_decoder_that_is_trained_alone_is_not_stopped_and_one_on_a_random_encoder_is(tmp_path):
    data = loader(speech()[:64])
    assert fit(frozen(stepped(front())), data, tmp_path / "tuned", 8, stop=True, probe=False).trace.last_step == 8
    doctor = fit(frozen(front()), data, tmp_path / "random", 8, stop=True, probe=False)
    assert doctor.trace.last_step < 8 and doctor.report().findings[0].id == "frozen"


def test_what_tells_trained_weights_from_drawn_ones():
    drawn, trained = front(), stepped(front())
    assert look_trained(dict(drawn.named_parameters())) is False
    assert look_trained(dict(trained.named_parameters())) is True
    assert look_trained(dict(nn.LSTM(16, 32, 2).named_parameters())) is False
    assert look_trained(dict(heavy_tailed(front(norm=False)).encoder.named_parameters())) is None
    assert look_trained({}) is None


# ---- check ---------------------------------------------------------------------------------------------------------


def gains_moved(model):
    with torch.no_grad():
        for name, p in model.encoder.named_parameters():
            if name.endswith("weight") and p.dim() == 1:
                p.add_(0.01 * torch.randn_like(p))
    return model


def frozen_in(report):
    return [(f.weight, f.cause) for f in report.findings if f.id == "frozen"]


def test_check_of_a_trained_encoder_that_is_frozen_warns_and_says_what_it_saw():
    (weight, cause), = frozen_in(examine(model=frozen(gains_moved(stock())), families=["gradients"]))
    assert weight == "warning" and "gains of their normalisations differ" in cause
    report = examine(model=frozen(stock()), families=["gradients"])
    assert frozen_in(report)[0][0] == "prevents" and report.ids[0] == "frozen"


def test_check_of_a_model_that_was_restored_and_of_one_with_nemos_adapters(tmp_path):
    from nemo.collections.asr.models import EncDecCTCModel
    from nemo.collections.common.parts.adapter_modules import LinearAdapterConfig

    target = "nemo.collections.asr.modules.conformer_encoder.ConformerEncoderAdapter"
    model = EncDecCTCModel(config(encoder___target_=target))
    model.save_to(str(tmp_path / "m.nemo"))
    restored = frozen(EncDecCTCModel.restore_from(str(tmp_path / "m.nemo"), map_location="cpu"))
    (weight, cause), = frozen_in(examine(model=restored, families=["gradients"]))
    assert weight == "warning" and "restored from" in cause and "m.nemo" in cause

    model.add_adapter(name="mine", cfg=LinearAdapterConfig(in_features=WIDTH, dim=4))
    model.freeze()
    model.set_enabled_adapters(enabled=True)
    model.unfreeze_enabled_adapters()
    report = examine(model=model, families=["gradients"])
    assert report.exit_code == 0 and [f.id for f in report.of_weight("prevents")] == [], report.findings
    assert "adapters are trained" in frozen_in(report)[0][1]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    found = optimizer_findings(SimpleNamespace(optimizers=[optimizer]), model)
    assert [(f.id, f.weight) for f in found] == [("frozen", "warning")]


# ---- explain -------------------------------------------------------------------------------------------------------


def two_checkpoints(folder, learns: bool, gains=None):
    """A run whose encoder is the same at both ends; `gains` of its normalisation."""
    torch.manual_seed(0)
    still = {"encoder.0.weight": torch.randn(30, 30), **({} if gains is None else {"encoder.norm.weight": gains})}
    for step in (100, 1000):
        weights = {**still, "decoder.0.weight": torch.randn(30, 1) + step}
        torch.save({"state_dict": weights, "global_step": step}, folder / f"step{step}.ckpt")
    loss = (lambda s: 0.1 + 2.8 * math.exp(-s / 200)) if learns else (lambda s: 2.9 + 0.01 * math.sin(s))
    write_curve(folder, [{"step": s, "loss_per_char": loss(s), "learning_rate": 1e-3, "grad_norm": 1.0}
                         for s in range(10, 1001, 10)])


@pytest.mark.parametrize("learns, gains, weight, words", [
    (False, None, "prevents", "Nothing updates them"), (True, None, "warning", "the loss has fallen"),
    (False, torch.linspace(0.8, 1.2, 30), "warning", "gains"), (False, torch.ones(30), "prevents", "Nothing updates"),
])
def test_an_encoder_that_never_moved_may_be_meant_where_the_run_has_learned(tmp_path, learns, gains, weight, words):
    two_checkpoints(tmp_path, learns, gains)
    (found, cause), = frozen_in(examine(run=tmp_path, families=["run"]))
    assert found == weight and words in cause
