"""The doctor from the command line.

    python -m tools.doctor check --config-name conformer corpus=mini           # a recipe of ours, with overrides
    python -m tools.doctor check --config my.yaml --train train.json           # any NeMo CTC configuration
    python -m tools.doctor check --model my.nemo --train train.json --test test.json
    python -m tools.doctor check --train train.json --only data                # manifests alone, without torch
    python -m tools.doctor explain exp/conformer_mini                          # a run, finished or dead
    python -m tools.doctor list                                                # what it knows

Exit code: 0 healthy, 1 findings that prevent learning, 2 could not examine.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from tools.doctor.finding import PAGES, Report
from tools.doctor.registry import FAMILIES, catalogue
from tools.doctor.terminal import render

DATA_FAMILIES = ("data", "audio", "pairs")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="before training: data, vocabulary, model, schedule")
    source = check.add_mutually_exclusive_group()
    source.add_argument("--config-name", "-cn", metavar="RECIPE", help="a recipe of conf/")
    source.add_argument("--config", metavar="YAML", help="a configuration of NeMo's kind or ours")
    check.add_argument("--model", metavar="FILE", help="a .nemo or a checkpoint")
    for role in ("train", "validation", "test"):
        check.add_argument(f"--{role}", metavar="JSON", nargs="+", help=f"manifests for {role}")
    check.add_argument("overrides", nargs="*", help="Hydra overrides of the recipe, KEY=VALUE or GROUP=OPTION")
    explain = commands.add_parser("explain", help="after training: what happened in a run's folder")
    explain.add_argument("run", metavar="RUN_DIR", help="folder with config.yaml, curve.csv, logs, checkpoints")
    for command in (check, explain):
        command.add_argument("--only", metavar="FAMILY", nargs="+", choices=list(FAMILIES),
                             help=f"families of checks: {', '.join(FAMILIES)}; `data` brings audio and pairs")
        command.add_argument("--seconds", type=_seconds, default=60.0, help="budget (default 60)")
        command.add_argument("--device", help="where to probe the model (default: a GPU where there is one)")
        command.add_argument("--json", metavar="OUT", help="save the report as JSON")
        command.add_argument("--html", metavar="OUT", help="save the report as a self-contained page")
    listing = commands.add_parser("list", help="the catalogue of faults, or one page of it")
    listing.add_argument("fault", nargs="?", help="id of a fault, to print its page")
    args, rest = parser.parse_known_args(argv)
    # Overrides may stand anywhere, also after options that take several values.
    if rest and (args.command != "check" or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognised arguments: {' '.join(rest)}")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    if args.command == "list":
        return show_catalogue(args.fault)
    report = run_check(args, rest) if args.command == "check" else run_explain(args)
    return put_out(report, args)


def run_check(args, rest: list[str]) -> Report:
    """`check`: the report of what the arguments name."""
    from tools.doctor.engine import examine
    from tools.doctor.subject import LIGHT_FAMILIES

    overrides = [*args.overrides, *rest]
    manifests = {}
    for role in ("train", "validation", "test"):
        # An override behind --train a.json b.json is taken for one more path.
        paths = getattr(args, role) or []
        overrides += [path for path in paths if "=" in path and not os.path.exists(path)]
        if paths := [path for path in paths if path not in overrides]:
            manifests[role] = paths
    families = with_data(args.only)
    config = args.config_name or args.config
    light = families is not None and set(families) <= LIGHT_FAMILIES and not args.model
    if not light and (config or args.model):
        prepare_torch()
    return examine(config=config, model=args.model, manifests=manifests or None, seconds=args.seconds,
                   device=args.device, families=families, overrides=overrides)


def run_explain(args) -> Report:
    """`explain`: the report of a run's folder."""
    from tools.doctor.engine import examine

    prepare_torch()
    return examine(run=args.run, seconds=args.seconds, device=args.device, families=with_data(args.only))


def with_data(only: list[str] | None) -> list[str] | None:
    if only and "data" in only:
        return [*dict.fromkeys([*only, *DATA_FAMILIES])]
    return only


def prepare_torch() -> None:
    """Threads and quiet imports, before torch is."""
    from recipes.quiet import quiet_imports
    from recipes.threads import set_threads

    set_threads()
    quiet_imports()


def put_out(report: Report, args) -> int:
    """Prints and saves a report; returns its exit code."""
    print(render(report, colour=sys.stdout.isatty() and not os.environ.get("NO_COLOR")), end="")
    for path, text in ((args.json, lambda: f"{report.to_json()}\n"), (args.html, lambda: _page(report))):
        if path is None:
            continue
        from manifests.schema import write_atomic

        try:
            write_atomic(path, text().encode())
        except OSError as error:
            print(f"doctor: cannot write {path}: {error.strerror or error}", file=sys.stderr)
            return 2
    return report.exit_code


def _page(report: Report) -> str:
    from tools.doctor.html import render as render_html

    return render_html(report)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds over 0")
    return value


def show_catalogue(fault: str | None = None) -> int:
    """Prints every fault with its title, or the page of one."""
    titles = catalogue()
    if fault is None:
        width = max(map(len, titles), default=0)
        for name, title in titles.items():
            print(f"{name:<{width}}  {title}")
        print(f"\n{len(titles)} faults; `python -m tools.doctor list FAULT` prints a page.")
        return 0
    if fault not in titles:
        import difflib

        near = difflib.get_close_matches(fault, titles, n=1)
        print(f"doctor: no fault {fault!r}{'; did you mean ' + near[0] + '?' if near else ''}", file=sys.stderr)
        return 2
    print((PAGES / f"{fault}.md").read_text(encoding="utf-8"), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
