"""Makes a band again: `python -m tools.doctor.bands CURVE.csv ... --recipe RECIPE --corpus CORPUS`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from manifests.schema import write_atomic
from tools.doctor.bands import FOLDER, learn


def main(arguments: list[str] | None = None) -> int:
    """Writes one band file; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.doctor.bands", description=__doc__)
    parser.add_argument("curves", nargs="+", type=Path, help="curve.csv of healthy runs, of several seeds if there are")
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--out", type=Path, help="default: <recipe>_<corpus>.json beside this module")
    args = parser.parse_args(arguments)
    try:
        band = learn(args.curves, args.recipe, args.corpus)
        out = args.out or FOLDER / f"{args.recipe}_{args.corpus}.json"
        write_atomic(out, (json.dumps(band) + "\n").encode())
    except (OSError, ValueError) as error:
        print(f"bands: {error}", file=sys.stderr)
        return 1
    print(f"{out}: {band['runs']} run(s), {', '.join(band['columns'])}, up to step {band['steps']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
