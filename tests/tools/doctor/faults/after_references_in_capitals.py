"""A good model and a WER of 100 percent: references as published, in capitals and with full stops, hypotheses not."""

import json

from tests.tools.doctor.faults import Fault
from tests.tools.doctor.setups import tones


def make(folder):
    from recipes.metrics import count_errors
    from tests.tools.doctor.setups.learning import transcribe
    from tests.tools.doctor.setups.runs import compose, train_recipe

    run = folder / "run"
    given = tones.manifests(folder)
    model = train_recipe(compose("conformer", given, run, "trainer.max_steps=200"), run)
    rows = tones.read(given["validation"][0])
    said = transcribe(model, rows)
    scored = [{**row, "text": row["text"].upper() + ".", "pred_text": text} for row, text in zip(rows, said)]
    tones.write(run / "evaluation" / "predictions_dev.json", scored)
    # By a script of one's own, without normalisation.
    pairs = [(row["text"].split(), row["pred_text"].split()) for row in scored]
    wrong = sum(max(len(r), len(h)) - sum(a == b for a, b in zip(r, h)) for r, h in pairs)
    wer = wrong / sum(len(r) for r, _ in pairs)
    (run / "evaluation" / "metrics.json").write_text(json.dumps({"sets": {"dev": {"wer": wer}}}))
    true = count_errors([row["text"].lower().rstrip(".") for row in scored], said)[0].rate
    (run / "true_wer.txt").write_text(f"{wer:.3f} by the script, {true:.3f} in truth\n")
    return {"run": str(run)}


FAULT = Fault("after_references_in_capitals", ("metric-normalisation",), "after", make)
