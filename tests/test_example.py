"""example.ipynb runs from its first cell to its last."""

import json

import matplotlib
import pytest

from tests.conftest import ROOT
from tests.recipes import tiny


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """The notebook's variables after all its cells, on noise in place of the mini corpus and a tiny model."""
    matplotlib.use("Agg")
    folder = tmp_path_factory.mktemp("example")
    texts = ["she sold eggs", "two old dogs", "he ran home", "a cold day", "we sang", "his red hat", "my cat", "no rain"]
    rows = tiny.corpus(folder, seconds=[1.2 + 0.1 * i for i in range(8)])
    for row, text in zip(rows, texts):
        row["text"] = text
    manifest = tiny.write_rows(folder / "rows.json", rows)
    tiny.model().save_to(str(folder / "tiny.nemo"))
    cells = json.loads((ROOT / "example.ipynb").read_text())["cells"]
    codes = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert "TRAIN, DEV, TEST =" in codes[0] and "MODEL =" in codes[0]
    names: dict = {}
    for number, code in enumerate(codes):
        exec(compile(code, f"example.ipynb, code cell {number}", "exec"), names)
        if number == 0:
            names |= dict.fromkeys(("TRAIN", "DEV", "TEST"), str(manifest))
            names["MODEL"] = str(folder / "tiny.nemo")
    return names


def test_a_batch_is_learned_the_mistake_is_named_and_the_model_transcribes(seen):
    assert seen["losses"][-1] < 0.5 * seen["losses"][0]
    assert seen["report"].findings[0].id == "time-scrambled" and seen["report"].exit_code == 1
    assert len(seen["hypotheses"]) == 8 and seen["words"].reference == sum(len(r["text"].split()) for r in seen["rows"])


def test_it_is_saved_without_outputs():
    cells = json.loads((ROOT / "example.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
