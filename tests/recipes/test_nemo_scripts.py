"""NeMo's own scripts open our models when they run through `python -m recipes.nemo`."""

import json
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT
from tests.recipes import tiny
from tests.recipes.tiny import corpus, write_rows

# Written the way NeMo's examples/asr/transcribe_speech.py and speech_to_text_eval.py are.
SCRIPT = '''
import json
from dataclasses import dataclass
from typing import Optional

from omegaconf import MISSING

import helper_beside_the_script
from nemo.collections.asr.metrics.wer import word_error_rate
from nemo.collections.asr.models import ASRModel
from nemo.collections.asr.parts.utils.manifest_utils import read_manifest
from nemo.core.config import hydra_runner


@dataclass
class EvaluationConfig:
    model_path: str = MISSING
    dataset_manifest: str = MISSING
    output_filename: Optional[str] = None
    batch_size: int = 2


@hydra_runner(config_name="EvaluationConfig", schema=EvaluationConfig)
def main(cfg: EvaluationConfig):
    model = ASRModel.restore_from(cfg.model_path, map_location="cpu")
    rows = read_manifest(cfg.dataset_manifest)
    hypotheses = model.transcribe([row["audio_filepath"] for row in rows], batch_size=cfg.batch_size, verbose=False)
    for row, hypothesis in zip(rows, hypotheses):
        row["pred_text"] = hypothesis.text
    with open(cfg.output_filename, "w") as file:
        for row in rows:
            file.write(json.dumps(row) + "\\n")
    wer = word_error_rate([row["pred_text"] for row in rows], [row["text"] for row in rows])
    print(f"{helper_beside_the_script.NAME} {type(model).__module__} {wer}")


if __name__ == "__main__":
    main()
'''


def run(*arguments):
    command = [sys.executable, "-m", "recipes.nemo", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_script_like_nemos_evaluates_a_model_of_ours(tmp_path):
    from recipes.ctc_model import CTCModel
    from recipes.evaluate import evaluate_model

    cfg = tiny.config()
    cfg.encoder = {"_target_": "recipes.deepspeech.encoder.DeepSpeechEncoder", "feat_in": 16, "hidden": 16}
    cfg.decoder.feat_in = None
    torch.manual_seed(0)
    ours = CTCModel(cfg).eval()
    tiny.talkative(ours)
    ours.save_to(str(tmp_path / "ours.nemo"))
    manifest = write_rows(tmp_path / "m.json", corpus(tmp_path))
    script = tmp_path / "scripts" / "speech_to_text_eval.py"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    (script.parent / "helper_beside_the_script.py").write_text("NAME = 'beside'\n")
    done = run(
        script, f"model_path={tmp_path}/ours.nemo", f"dataset_manifest={manifest}",
        f"output_filename={tmp_path}/out.json", f"hydra.run.dir={tmp_path}",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    name, module, wer = done.stdout.strip().splitlines()[-1].split()
    assert (name, module) == ("beside", "recipes.ctc_model")
    metrics = evaluate_model(ours, manifest, progress=False)
    assert float(wer) == pytest.approx(metrics["overall"]["wer"])
    written = [json.loads(line) for line in open(tmp_path / "out.json")]
    assert [row["pred_text"] for row in written] == [pair["hypothesis"] for pair in metrics["pairs"]]


PLAIN = '''
import os, sys
print(sys.argv, __name__, __file__, sys.path[0], os.getcwd(), sep="|")
import recipes
assert "nemo" not in sys.modules
sys.exit(int(sys.argv[1]))
'''


def test_arguments_search_path_and_exit_status_are_as_python_gives_them(tmp_path):
    (tmp_path / "plain.py").write_text(PLAIN)
    for status in (0, 7):
        through = run(tmp_path / "plain.py", status, "b c", "--flag=1")
        direct = subprocess.run(
            [sys.executable, str(tmp_path / "plain.py"), str(status), "b c", "--flag=1"], cwd=ROOT, capture_output=True,
            text=True, env={"PYTHONPATH": str(ROOT)},
        )
        assert through.returncode == direct.returncode == status, through.stderr
        assert through.stdout == direct.stdout


def test_a_script_that_fails_shows_its_traceback(tmp_path):
    (tmp_path / "bad.py").write_text("def f():\n    raise KeyError('gone')\nf()\n")
    done = run(tmp_path / "bad.py")
    assert done.returncode == 1 and "bad.py\", line 2" in done.stderr
    assert done.stderr.rstrip().endswith("KeyError: 'gone'")


def test_started_by_path_it_does_not_hide_nemo(tmp_path):
    """recipes/nemo.py has the name of the package it serves; started from its own folder it must not be found first."""
    (tmp_path / "where.py").write_text("import importlib.util; print(importlib.util.find_spec('nemo').origin)\n")
    done = subprocess.run(
        [sys.executable, "recipes/nemo.py", str(tmp_path / "where.py")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip().endswith("site-packages/nemo/__init__.py"), done.stdout + done.stderr
    for name in ("evaluate", "transcribe", "export", "train"):
        program = (
            "import runpy, sys, importlib.util\n"
            f"sys.path[0] = 'recipes'; sys.argv = ['recipes/{name}.py', '--help']\n"
            "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "except SystemExit: pass\n"
            "print(importlib.util.find_spec('nemo').origin)\n"
        )
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.strip().endswith("site-packages/nemo/__init__.py"), (name, done.stdout, done.stderr)


@pytest.mark.parametrize("arguments, said", [([], "give the script to run"), (["gone.py"], "gone.py: no such script"),
                                             (["recipes"], "recipes: is a folder")])
def test_no_script_is_one_line(arguments, said):
    done = run(*arguments)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""
