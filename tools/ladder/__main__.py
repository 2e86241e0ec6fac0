"""What a recipe can learn, from one batch upwards; it stops at the first rung that fails and says what that rules out.

    python -m tools.ladder --rungs batch --out exp/x/one_batch.json --config-name deepspeech2 corpus=mini
    python -m tools.ladder --rungs all --out exp/x/ladder --config-name conformer corpus=librispeech_8h trainer=cpu

batch  the targets fit into the output, and eight utterances are learned by heart, to WER 0; without dropout and masks
64     64 short utterances by the recipe's own training, without dropout and masks, to 5 % of their characters wrong
1h     one hour by the recipe as it is, to 20 % of what it trains on wrong
all    the recipe as it is on all of its data, in its own folder, to 30 % on dev

A rung has to be climbed before the next is tried. Above `batch`, --out is a folder (by default `ladder` in the recipe's
own) for ladder.json, ladder.md, ladder.png and a folder a rung; a complete rung is not run again, an interrupted one
goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from manifests.schema import ManifestError, write_atomic
from recipes.config import ROOT, ConfigError, compose
from recipes.quiet import quiet_imports
from recipes.threads import set_threads
from tools.ladder.batch import RungFailed, check_fit, choose, climb, learn_by_heart, without_regularisation
from tools.ladder.rungs import ABOVE_BATCH, NAMES, up_to

__all__ = ["RungFailed", "check_fit", "choose", "climb", "learn_by_heart", "main", "without_regularisation"]

EXIT_FAILED, EXIT_ENDED = 1, 143


def main(arguments: list[str] | None = None) -> int:
    """Climbs; returns the exit status: 0 where all rungs asked for were climbed, 143 where it was asked to end."""
    parser = argparse.ArgumentParser(prog="python -m tools.ladder", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rungs", choices=NAMES, default="batch", help="the last rung to climb")
    parser.add_argument("--out", type=Path, help="with --rungs batch the JSON to write, else a folder")
    parser.add_argument("--max-steps", type=int, default=1000, help="of the rung batch")
    for name, kind in (("target", "character error rate to reach, 0.2"), ("epochs", "passes before it gives up"),
                       ("minutes", "minutes of training before it gives up")):
        parser.add_argument(f"--{name}", action="append", default=[], metavar="RUNG=VALUE",
                            help=f"of a rung above batch: {kind}; may be given several times")
    parser.add_argument("--config-name", default="deepspeech2")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for recipes/train.py")
    args = parser.parse_args(arguments)
    changes = {name: _changes(parser, name, getattr(args, name)) for name in ("target", "epochs", "minutes")}
    set_threads()
    quiet_imports()
    from recipes.data import DataError

    try:
        return _one_batch(args) if args.rungs == "batch" else _ladder(args, changes)
    except (ConfigError, DataError, ManifestError, RungFailed) as error:
        print(f"ladder: {error}", file=sys.stderr)
        return EXIT_FAILED


def _changes(parser, field: str, given: list[str]) -> dict[str, float]:
    """{rung: value} of RUNG=VALUE, each checked."""
    changed = {}
    for item in given:
        name, _, value = item.partition("=")
        valid = [rung.name for rung in ABOVE_BATCH if field != "epochs" or not rung.whole]
        if name not in valid:
            hint = "; of all it is the recipe's own, training.epochs=N" if (field, name) == ("epochs", "all") else ""
            parser.error(f"--{field} {item}: the rung must be one of {', '.join(valid)}{hint}")
        try:
            changed[name] = float(value)
        except ValueError:
            changed[name] = 0.0
        if not 0 < changed[name] < (1 if field == "target" else 1e6):
            below = " and below 1" if field == "target" else ""
            parser.error(f"--{field} {item}: {value!r} must be a number over 0{below}")
    return changed


def _one_batch(args) -> int:
    measured = climb(compose(args.config_name, args.overrides), args.max_steps)
    batch = measured["batch"]
    print(f"   one batch of {batch['utterances']} learned by heart: WER 0 at step {batch['step']}, "
          f"{batch['seconds']:.0f} s")
    if args.out:
        write_atomic(args.out, (json.dumps(measured, indent=1, ensure_ascii=False) + "\n").encode())
    return 0


def _ladder(args, changes: dict[str, dict[str, float]]) -> int:
    from tools.ladder.climb import Interrupted, Ladder, TrainingFailed
    from tools.ladder.climb import climb as climb_rungs
    from tools.ladder.table import markdown

    out = args.out.resolve() if args.out else None
    if out is not None and (out.is_file() or out.suffix == ".json"):
        raise ConfigError(f"--out {args.out}: above the rung batch this is a folder")
    os.chdir(ROOT)  # paths in the YAML files are relative to the root
    if out is None:
        cfg = compose(args.config_name, args.overrides)
        out = Path(cfg.exp_manager.explicit_log_dir).resolve() / "ladder"
    rungs = up_to(args.rungs, {
        rung.name: {field: values[rung.name] for field, values in changes.items() if rung.name in values}
        for rung in ABOVE_BATCH
    })
    options = ["--rungs", args.rungs, *(["--out", str(args.out)] if args.out else [])]
    options += [part for field, values in changes.items() for name, value in values.items()
                for part in (f"--{field}", f"{name}={value:g}")]
    ladder = Ladder(args.config_name, args.overrides, out, options)
    try:
        good = climb_rungs(ladder, rungs, args.max_steps)
    except TrainingFailed as error:
        print(f"ladder: {error}", file=sys.stderr)
        return EXIT_FAILED
    except Interrupted as error:
        print(f"ladder: {error}", file=sys.stderr)
        return EXIT_ENDED
    written = json.loads((out / "ladder.json").read_text())
    print("\n".join(line for line in markdown(written) if line.startswith("|")))
    print(f"{out}/ladder.md")
    if good:
        return 0
    print(f"ladder: {ladder.results[-1]['verdict']}", file=sys.stderr)
    return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
