"""Devices: the curve of one recipe with one global batch on 1, 2 and 4 processes.

    python -m tools.bench devices --corpus mini --steps 360
    python -m tools.bench devices --manifest train.json --dev dev.json -- size=small

Each number of processes trains the recipe anew with trainer=cpu_ddp over gloo on this machine's CPU, one thread each, the
same global batch in seconds, steps and schedule. How far two such runs may lie apart is shown by a second run of one
process with another seed. Compared at each validation, over all of the validation set: its loss a character and WER.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from manifests.report import table
from tools.bench._common import ROOT, BenchError, describe, guarded, parser, save
from tools.report.curve import read_curve


def command(options, folder: Path, processes: int, seed: int) -> list[str]:
    """One training in a process of its own."""
    ddp = ["trainer=cpu_ddp", f"trainer.devices={processes}"]
    where = [f"corpus.train={options.manifest}", f"corpus.validation={options.dev}"] if options.manifest else []
    return [
        sys.executable, "-m", "recipes.train", "--config-name", options.recipe, f"corpus={options.corpus}", *where,
        *(ddp if processes > 1 else []), f"trainer.precision={options.precision}", f"trainer.max_steps={options.steps}",
        f"corpus.validations={options.validations}", f"seed={seed}", "logger=csv",
        f"exp_manager.explicit_log_dir={folder}", *options.overrides,
    ]


def train(options, folder: Path, processes: int, seed: int) -> list[dict[str, float]]:
    """The validations of one run: step, val_loss in nats a character, val_wer. Raises BenchError where it fails."""
    print(f"{processes} process{'es' if processes > 1 else ''}, seed {seed}", file=sys.stderr, flush=True)
    done = subprocess.run(
        command(options, folder, processes, seed), cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise BenchError(f"training on {processes} process(es) ended with status {done.returncode}: {last}")
    return validations(folder / "curve.csv")


def validations(curve: Path) -> list[dict[str, float]]:
    """The steps of a curve.csv that have a validation, with its figures."""
    columns = read_curve(curve)
    return [
        {"step": int(step), "val_loss": loss, "val_wer": wer}
        for (step, loss), (_, wer) in zip(columns["val_loss"], columns["val_wer"], strict=True)
    ]


def compare(runs: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    """One row a validation: its step, then loss and WER in % of each run. Raises BenchError where the steps differ."""
    steps = [[row["step"] for row in run] for run in runs.values()]
    if any(each != steps[0] for each in steps):
        raise BenchError(f"the runs were validated at other steps: {dict(zip(runs, steps))}")
    return [
        [str(step), *(f"{run[i]['val_loss']:.3f} ({run[i]['val_wer']:.1%})" for run in runs.values())]
        for i, step in enumerate(steps[0])
    ]


def farthest(runs: dict[str, list[dict[str, float]]], first: str, others: Sequence[str]) -> float:
    """Largest difference in validation loss between the first run and the others, as a share of the first's."""
    return max(
        abs(a["val_loss"] - b["val_loss"]) / a["val_loss"] for other in others for a, b in zip(runs[first], runs[other])
    )


def run(options, argv: Sequence[str]) -> dict:
    """All runs, compared; writes the result."""
    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="devices-") as folder:
        for name, processes, seed in [("1 process", 1, 1234), ("1, another seed", 1, 4321)] + [
            (f"{n} processes", n, 1234) for n in options.processes if n > 1
        ]:
            runs[name] = train(options, Path(folder) / f"{processes}_{seed}", processes, seed)
    rows = compare(runs)
    names = list(runs)
    noise, apart = farthest(runs, names[0], names[1:2]), farthest(runs, names[0], names[2:])
    head = ["step", *(f"{name}: loss (WER)" for name in names)]
    remarks = [
        f"Validation loss at most {apart:.1%} from that of one process; another seed is at most {noise:.1%} away."
    ]
    print(table(head, rows), *remarks, sep="\n")
    return save(options.json, "devices", __doc__, argv, describe("CPU", 1), head, rows, options.note,
                runs=runs, farthest={"processes": apart, "seed": noise}, remarks=remarks)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0, or 1 after one line where a run failed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parser("devices", __doc__)
    options.add_argument("--recipe", default="deepspeech2")
    options.add_argument("--corpus", default="mini")
    options.add_argument("--manifest", type=Path, help="train on this in place of the corpus' own")
    options.add_argument("--dev", type=Path, help="and validate on this")
    options.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    options.add_argument("--steps", type=int, default=360)
    options.add_argument("--validations", type=int, default=4)
    options.add_argument("--precision", default="32", help="trainer.precision of all runs (default %(default)s)")
    options.add_argument("overrides", nargs="*", help="Hydra overrides for all runs, after --")
    chosen = options.parse_args(argv)
    if (chosen.manifest is None) != (chosen.dev is None):
        options.error("--manifest and --dev go together")
    if min(chosen.processes) < 2:
        options.error("--processes: one process is trained anyway; name the numbers above 1 to set beside it")
    return guarded("devices", lambda: run(chosen, argv))
