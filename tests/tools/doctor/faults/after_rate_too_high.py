"""A finished run of DeepSpeech2 at a hundred times its rate."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import tones


def make(folder):
    from tests.tools.doctor.setups.runs import compose, train_recipe

    run = folder / "run"
    more = ["model.optim.lr=0.5", "trainer.max_steps=120"]
    train_recipe(compose("deepspeech2", tones.manifests(folder), run, *more), run)
    return {"run": str(run)}


FAULT = Fault("after_rate_too_high", ("lr-too-high", "run-diverged"), "after", make)
