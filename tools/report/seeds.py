"""Runs of one recipe that differ in their seed alone: what they reached, how far they lie apart, and their curves.

    for seed in 1 2 3 4 5; do ./run.sh --exp exp/seed$seed -- seed=$seed; done
    python -m tools.report.seeds exp/seed? --publish recipes/deepspeech2/results/seeds --command "./run.sh -- seed=N"

Writes `<corpus>_<seed>.csv` for each run, `<corpus>.json` with what each reached, and `<corpus>.png` with all curves.
Prints the table for the recipe's README: a difference between two recipes that is smaller than what lies between two
seeds is none. `python -m tools.doctor.bands` makes the band of healthy runs from the same curves.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path

from manifests.schema import write_atomic
from tools.report.__main__ import commit, evaluated, hardware, result_name, unit
from tools.report.curve import draw, read_curve

OWN = ("seed", "model.train_ds.seed", "model.train_ds.shard_seed")  # the seed, and what follows from it
# What one run may change from sitting to sitting and two runs that are compared may not.
FIXED = ("init_from", "trainer.precision", "trainer.devices", "trainer.num_nodes")


def read_run(folder: Path) -> dict:
    """What one run reached: seed, steps, minutes, error rates of all test sets. Raises OSError, KeyError, ValueError."""
    config, metrics = evaluated(folder)
    step, seconds = read_curve(folder / "curve.csv")["seconds"][-1]
    rates = {
        part["name"]: {"wer": part["wer"], "cer": part["cer"]}
        for part in [*metrics["manifests"], {**metrics["overall"], "name": "all"}]
    }
    return {
        "seed": config["seed"], "steps": int(step), "minutes": round(seconds / 60, 2), "commit": commit(folder),
        "test_sets": rates,
    }


def check_alike(folders: list[Path]) -> None:
    """Raises ValueError where the configuration of a run differs from the first one's in more than the seed.

    Of what may change between two sittings of one run (recipes.resume.FREE), FIXED alone is compared.
    """
    from omegaconf import OmegaConf

    from recipes.resume import changes

    first = OmegaConf.load(folders[0] / "config.yaml")
    for folder in folders[1:]:
        other = OmegaConf.load(folder / "config.yaml")
        found = [line for line in changes(first, other) if line.split()[0] not in OWN]
        for key in FIXED:
            was, now = OmegaConf.select(first, key), OmegaConf.select(other, key)
            if was != now:
                found.append(f"{key} was {was}, now {now}")
        if found:
            more = f" ({len(found) - 1} more)" if len(found) > 1 else ""
            raise ValueError(f"{folder} differs from {folders[0]} in more than its seed: {found[0]}{more}")


def publish(folders: list[Path], out: Path, command: str) -> dict:
    """Keeps curves and results of the runs in `out`; returns what was written as JSON.

    Raises OSError, KeyError or ValueError where runs are not evaluated, have the same seed, or differ in more than it.
    """
    runs = sorted(((read_run(folder), folder) for folder in folders), key=lambda pair: pair[0]["seed"])
    seeds = [run["seed"] for run, _ in runs]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"the runs have the seeds {seeds}: give each another one, -- seed=N")
    check_alike([folder for _, folder in runs])
    config, metrics = evaluated(folders[0])
    name = result_name(config, out.resolve().parent)
    out.mkdir(parents=True, exist_ok=True)
    for run, folder in runs:
        shutil.copyfile(folder / "curve.csv", out / f"{name}_{run['seed']}.csv")
    draw({f"seed {run['seed']}": folder / "curve.csv" for run, folder in runs}, out / f"{name}.png", unit(folders[0]))
    kept = {
        "recipe": config["name"], "corpus": config["corpus"]["name"], "command": command, "hardware": hardware(folders[0]),
        "decoding": metrics["decoding"], "runs": [run for run, _ in runs],
    }
    write_atomic(out / f"{name}.json", (json.dumps(kept, indent=1) + "\n").encode())
    return kept


def spread_table(kept: dict) -> list[str]:
    """Mean, standard deviation (of the runs, n - 1), lowest and highest WER of each test set in %, lines of Markdown."""
    runs = kept["runs"]
    lines = [
        "| test set | seeds | WER %, mean | standard deviation | lowest to highest | CER %, mean |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in runs[0]["test_sets"]:
        wer, cer = ([100 * run["test_sets"][name][kind] for run in runs] for kind in ("wer", "cer"))
        deviation = f"{statistics.stdev(wer):.2f}" if len(wer) > 1 else ""
        lines.append(
            f"| {name} | {len(runs)} | {statistics.mean(wer):.2f} | {deviation} | {min(wer):.2f} to {max(wer):.2f} | "
            f"{statistics.mean(cer):.2f} |"
        )
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.report.seeds", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exp", nargs="+", type=Path, help="folders of the runs")
    parser.add_argument("--publish", required=True, type=Path, metavar="DIR", help="where curves and results are kept")
    parser.add_argument("--command", required=True, help="the command that trained, with N for the seed")
    args = parser.parse_args(arguments)
    try:
        print("\n".join(spread_table(publish(args.exp, args.publish, args.command))))
    except (OSError, ValueError, KeyError) as error:
        print(f"seeds: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
