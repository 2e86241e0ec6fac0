"""Measurements of the project against others, alternating on one machine.

    python -m tools.bench NAME [options]
    python -m tools.bench NAME --help
"""

import importlib
import pkgutil
import sys
from collections.abc import Sequence

import tools.bench


def list_benches() -> list[str]:
    """Names of the modules here that measure something."""
    names = (module.name for module in pkgutil.iter_modules(tools.bench.__path__))
    return sorted(name for name in names if not name.startswith("_"))


def first_line(name: str) -> str:
    """What a bench is about: the first line of its docstring."""
    return (importlib.import_module(f"tools.bench.{name}").__doc__ or "").strip().partition("\n")[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Call main(argv) of the bench named first; its return value is the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    names = list_benches()
    if not args or args[0] in ("-h", "--help"):
        listed = "\n".join(f"  {name:12} {first_line(name)}" for name in names)
        print(f"{__doc__.strip()}\n\nbenches:\n{listed}")
        return 0 if args else 2
    if args[0] not in names:
        print(f"error: no bench {args[0]!r}: there are {', '.join(names)}", file=sys.stderr)
        return 2
    return importlib.import_module(f"tools.bench.{args[0]}").main(args[1:]) or 0


if __name__ == "__main__":
    sys.exit(main())
