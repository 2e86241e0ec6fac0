"""A dead run of DeepSpeech with torchaudio's options: ReLU recurrence, no normalisation, no clipping."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import tones

TORCHAUDIO = [
    "model.encoder.context=0", "model.encoder.stride=1", "model.encoder.norm=none", "model.encoder.rnn_norm=none",
    "model.encoder.rnn_type=relu", "model.encoder.use_lengths=false", "model.encoder.init=torch",
]


def make(folder):
    from tests.tools.doctor.setups.runs import compose, train_recipe

    run = folder / "run"
    more = ["model.optim.lr=1e-2", "trainer.gradient_clip_val=0", "trainer.max_steps=80", "trainer.log_every_n_steps=1"]
    train_recipe(compose("deepspeech", tones.manifests(folder), run, *TORCHAUDIO, *more), run)
    return {"run": str(run)}


FAULT = Fault("after_relu_recurrence", ("explodes", "lr-too-high", "clip-missing", "run-plateau"), "after", make)
