"""Command line of the embedded corpus: make it, or report on one that is there."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from manifests.mini.build import MiniError, make
from manifests.mini.stats import report


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 when the corpus is complete, 1 with one line on standard error when it cannot be made."""
    parser = argparse.ArgumentParser(
        prog="python -m manifests.mini", description="Make the embedded corpus: DEST/LibriSpeech/<subset>/..."
    )
    parser.add_argument("dest", type=Path, metavar="DEST", help="folder that gets the tree LibriSpeech/")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes (default 0)")
    parser.add_argument("--jobs", type=int, default=2, help="speaking processes (default 2); any number, same bytes")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the sentences, or a multiple of train")
    parser.add_argument("--force", action="store_true", help="make it again even where it is complete")
    parser.add_argument("--stats", action="store_true", help="make nothing: report on the tree that is there")
    args = parser.parse_args(argv)
    try:
        tree = args.dest / "LibriSpeech" if args.stats else None
        if tree is None:
            tree = make(args.dest, args.seed, args.jobs, args.scale, args.force)
        print(report(tree))
    except (MiniError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: start the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
