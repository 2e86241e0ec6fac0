"""A finished run on transcripts that belong to other utterances: the loss stands at the letters' frequencies."""

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import tones


def make(folder):
    from tests.tools.doctor.setups.runs import compose, train_recipe

    rows = tones.corpus(folder)
    wrong = [{**row, "text": rows[(7 * i + 3) % len(rows)]["text"]} for i, row in enumerate(rows)]
    run = folder / "run"
    given = tones.manifests(folder, wrong)
    train_recipe(compose("conformer", given, run, "trainer.max_steps=150"), run)
    return {"run": str(run)}


FAULT = Fault(
    "after_wrong_pairs", ("data-mismatched-text", "run-plateau", "run-collapse-blank", "run-collapse-letter"), "after",
    make,
)
