"""A finished run with weight decay 10: all weights are nearly zero, the output is one symbol."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import tones


def make(folder):
    from tests.tools.doctor.setups.runs import compose, train_recipe

    run = folder / "run"
    more = ["training.weight_decay=10", "trainer.max_steps=150"]
    train_recipe(compose("deepspeech2", tones.manifests(folder), run, *more), run)
    return {"run": str(run)}


FAULT = Fault("after_weight_decay", ("weight-decay-range", "run-collapse-blank", "run-collapse-letter"), "after", make)
