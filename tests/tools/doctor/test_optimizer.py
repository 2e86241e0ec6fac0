"""An optimizer or a schedule that NeMo cannot make ends a training after its model and data are loaded."""

import pytest

torch = pytest.importorskip("torch")

from tests.tools.doctor.setups import models
from tools.doctor.causes import name_causes
from tools.doctor.engine import examine
from tools.doctor.finding import Finding

COSINE = {"name": "CosineAnnealing", "warmup_steps": 50}


def of(optim):
    cfg = models.recipe("conformer")
    cfg["model"]["optim"] = optim
    return examine(config=cfg, families=["optimizer"])


WRONG = {
    "noam without its width": ({"name": "adamw", "lr": 2.0, "sched": {"name": "NoamAnnealing", "warmup_steps": 50}},
                               "model.optim.sched", "'d_model'", "model.optim.sched.d_model=..."),
    "misspelt": ({"name": "admw", "lr": 1e-3, "sched": COSINE}, "model.optim", "admw", "model.optim.name=adamw"),
    "misspelt schedule": ({"name": "adamw", "lr": 1e-3, "sched": {**COSINE, "name": "CosineAnealing"}},
                          "model.optim.sched", "CosineAnealing", "model.optim.sched.name=CosineAnnealing"),
    "argument of another": ({"name": "sgd", "lr": 1e-3, "betas": [0.9, 0.98]}, "model.optim", "'betas'",
                            "remove model.optim.betas"),
    "two warm-ups": ({"name": "adamw", "lr": 1e-3, "sched": {**COSINE, "warmup_ratio": 0.1}}, "model.optim.sched",
                     "ratio", "mend model.optim.sched as the message says"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_made_is_named(case):
    optim, where, word, change = WRONG[case]
    (finding,) = of(optim).findings
    assert (finding.id, finding.weight, finding.where) == ("model-does-not-build", "prevents", where)
    assert word in finding.symptom and len(finding.symptom) < 200 and finding.fix[0].startswith(change)


@pytest.mark.parametrize("optim", [
    {"name": "adamw", "lr": 1e-3, "betas": [0.9, 0.98], "sched": COSINE},
    {"name": "novograd", "lr": 0.01, "betas": [0.8, 0.5], "weight_decay": 1e-3, "sched": {**COSINE, "max_steps": -1}},
    {"_target_": "torch.optim.AdamW", "lr": 1e-3, "sched": {"name": "InverseSquareRootAnnealing", "warmup_ratio": 0.1}},
    {"name": "adam", "lr": 1e-3},
    {"name": "adam", "lr": 1.0, "sched": {"name": "NoamAnnealing", "d_model": "${model.encoder.d_model}"}},
])
def test_what_can_be_made_is_examined_and_silent(optim):
    report = of(optim)
    assert not report.findings and [line.split(":")[0] for line in report.examined] == 2 * ["optimizer"]


@pytest.mark.parametrize("recipe", ["deepspeech", "deepspeech2", "conformer"])
def test_values_that_training_fills_in_are_not_missed(recipe):
    report = examine(config=recipe, families=["optimizer"])
    assert not report.findings and len(report.examined) == 2


def test_what_needs_other_hardware_is_not_judged():
    report = of({"name": "fused_adam", "lr": 1e-3, "sched": COSINE})
    assert not report.findings and "needs what is not here" in report.not_examined[0]


def test_a_missing_tokenizer_comes_before_the_model_that_it_stops():
    built = Finding("model-does-not-build", "prevents", "x", "y", {"error": "FileNotFoundError: no tokenizer.model"}, [], 1.0)
    other = Finding("model-does-not-build", "prevents", "x", "y", {"error": "TypeError: feat_in"}, [], 1.0)
    missing = Finding("tokenizer-vocabulary", "prevents", "There is no tokenizer", "y", {"folder": "/nowhere"}, [], 1.0)
    assert [(f.id, f.weight) for f in name_causes([built, missing])] == [
        ("model-does-not-build", "note"), ("tokenizer-vocabulary", "prevents")]
    assert {f.weight for f in name_causes([other, missing])} == {"prevents"}


def test_novograd_may_start_at_its_rate_as_nemos_quartznet_does():
    cfg = models.recipe("quartznet")
    cfg["model"]["optim"] = {"name": "novograd", "lr": 0.01, "sched": {"name": "CosineAnnealing", "warmup_steps": None}}
    found = {f.id: f.weight for f in examine(config=cfg, families=["schedule"]).findings}
    assert found.get("warmup-missing") in (None, "note")
    cfg["model"]["optim"]["name"] = "adam"
    found = {f.id: f.weight for f in examine(config=cfg, families=["schedule"]).findings}
    assert found["warmup-missing"] == "warning"


@pytest.mark.parametrize("kept, weight", [("list", "prevents"), ("dict", "prevents"), ("teacher", None), ("again", None)])
def test_modules_that_parameters_does_not_find(kept, weight):
    model = models.build(models.section("conformer"))
    layers = [torch.nn.Linear(48, 48) for _ in range(20)]
    plain = model.encoder.forward_internal

    def forward(*args, **kwargs):
        out, *rest = plain(*args, **kwargs)
        used = layers if kept in ("list", "dict") else []
        for layer in used:
            out = out + layer(out.transpose(1, 2)).transpose(1, 2)
        return out, *rest

    model.encoder.forward_internal = forward
    model.encoder.more = {"list": layers, "dict": dict(enumerate(layers)), "teacher": layers,
                          "again": list(model.encoder.layers)}[kept]
    found = [f for f in examine(model=model, families=["gradients"], seconds=120).findings if f.id == "not-in-optimizer"]
    assert [f.weight for f in found] == ([weight] if weight else [])
    assert all(p.grad is None for layer in layers for p in layer.parameters())
    for finding in found:
        assert finding.where.startswith("encoder.more.0") and "ModuleList" in finding.fix[0]
