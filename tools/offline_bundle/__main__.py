"""Trains where there is no network: pack here, carry the parts, then unpack, install, train and collect there.

On the node the first part runs by itself, with nothing but Python: `python3 bundle-001.pyz unpack --to DIR`.
Every command can be given again after a cut and goes on; nothing half-written has its final name.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from manifests.schema import ManifestError
from tools.offline_bundle.parts import STATE, BundleError, parse_size


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one to show."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.offline_bundle", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".",
                                   formatter_class=Defaults)

    have = command("have", "on the node: print its packages, for pack --has")
    have.set_defaults(run=run_have)

    pack = command("pack", "here: pack project, wheels and corpora into parts")
    pack.add_argument("--out", type=Path, required=True, help="folder for the parts and their index")
    pack.add_argument("--python", default="3.12", help="the node's Python")
    pack.add_argument("--platform", default="manylinux_2_28_x86_64", help="the node's glibc and processor")
    pack.add_argument("--has", action="append", default=[], metavar="FILE_OR_LIST",
                      help="what the node has: names separated by commas, or a file (of `have`, pip list, pip freeze)")
    pack.add_argument("--without", action="append", default=[], metavar="NAME",
                      help="leave a package out beyond wandb and the synthesizer")
    pack.add_argument("--corpus", action="append", default=[], metavar="[NAME=]FOLDER",
                      help="a folder of manifests, or the tree of a corpus in conf/corpus")
    pack.add_argument("--audio", choices=("auto", "flac", "opus"), default="auto", help="auto: FLAC within --max-audio")
    pack.add_argument("--max-audio", default="256MiB", help="size of all audio above which auto takes Opus")
    pack.add_argument("--opus-kbits", type=int, default=24, help="Opus's bit rate in kbit/s")
    pack.add_argument("--part-size", default="45MiB", help="size of a part at most")
    pack.add_argument("--rev", default="HEAD", help="what of the project is packed, a git revision")
    pack.add_argument("--no-wheels", action="store_true", help="project and corpora only, for a node that is installed")
    pack.add_argument("--work", type=Path, default=Path("build/offline_bundle"),
                      help="folder where wheels and encoded audio are kept between calls")
    pack.add_argument("--jobs", type=int, default=1, help="processes that encode audio")
    pack.set_defaults(run=run_pack)

    unpack = command("unpack", "verify the parts that have arrived and unpack them; also for what comes home")
    unpack.set_defaults(run=run_unpack)

    install = command("install", "on the node: make the environment without an index, and check it")
    directory(install)
    install.add_argument("--no-check", action="store_true", help="do not run the check")
    install.set_defaults(run=run_install)

    check = command("check", "on the node: requirements, NeMo's import, one pass of a model forward and back")
    directory(check)
    check.set_defaults(run=run_check)
    for parsed in (install, check):
        parsed.add_argument("--models", default="conformer", help="recipes to try, separated by commas")
        parsed.add_argument("--device", help="cpu, cuda or cuda:N; a GPU is used where there is one")

    train = command("train", "on the node: train the models one after the other, evaluate each")
    directory(train)
    train.set_defaults(run=run_train)
    collect = command("collect", "on the node: pack metrics, curves, predictions and fp16 weights for the way home")
    directory(collect)
    collect.set_defaults(run=run_collect)
    everything = command("all", "on the node: unpack, install, train and collect in one command")
    everything.set_defaults(run=run_all, no_check=False, device=None)
    for parsed in (unpack, everything):
        parsed.add_argument("--parts", type=Path, nargs="+", metavar="FOLDER",
                            help="folders with parts (default: where the first part lies)")
        parsed.add_argument("--to", type=Path, required=True, help="folder to unpack to")
    for parsed in (train, everything):
        training_options(parsed)
    for parsed in (collect, everything):
        parsed.add_argument("--out", type=Path, required=True, help="folder for the parts and their index")
        parsed.add_argument("--part-size", default="16MiB", help="size of a file at most")
        parsed.add_argument("--files", type=int, default=8, help="number of files at most, the index counted")
        parsed.add_argument("--no-weights", action="store_true", help="leave the weights there")
    collect.add_argument("--exp", type=Path, help="folder of the runs (default DIR/exp)")
    return parser


def training_options(train: argparse.ArgumentParser) -> None:
    train.add_argument("--models", default="deepspeech2,conformer,deepspeech", help="recipes, separated by commas")
    train.add_argument("--corpus", required=True, help="a corpus of the bundle")
    train.add_argument("--minutes", type=float, help="training time a model; without it the recipe's own length")
    train.add_argument("--steps", type=int, help="steps a model, instead of --minutes")
    train.add_argument("--stop-after", type=float, metavar="MINUTES",
                       help="end this sitting then, saved: status 75, and the same command goes on")
    train.add_argument("--evaluate", type=Path, nargs="+", default=[], metavar="MANIFEST",
                       help="manifests to evaluate on (default: all of the corpus but train)")
    train.add_argument("--exp", type=Path, help="folder for the runs (default DIR/exp)")
    train.add_argument("overrides", nargs="*", help="for recipes.train: KEY=VALUE, or MODEL:KEY=VALUE for one model; "
                       "trainer=gpu is set where there is a GPU")


def directory(parser: argparse.ArgumentParser) -> None:
    started = Path(sys.argv[0])  # `python3 DIR COMMAND` runs from the unpacked bundle itself
    default = started if (started / STATE).is_dir() else Path(".")
    parser.add_argument("--dir", type=Path, default=default, help="folder that the bundle was unpacked to")


def run_have(args) -> int:
    from tools.offline_bundle.node import list_packages

    print(list_packages())
    return 0


def run_pack(args) -> int:
    from tools.offline_bundle.pack import pack

    if not 6 <= args.opus_kbits <= 256:
        raise BundleError(f"--opus-kbits {args.opus_kbits}: 6 to 256")
    pack(args)
    return 0


def run_unpack(args) -> int:
    from tools.offline_bundle.node import run_unpack as unpack

    folders = args.parts or [Path(sys.argv[0]).resolve().parent]
    for folder in folders:
        if not folder.is_dir():
            raise BundleError(f"--parts {folder}: no such folder")
    return unpack(folders, args.to.absolute())


def run_install(args) -> int:
    from tools.offline_bundle.node import install

    return install(args.dir.absolute(), not args.no_check, check_arguments(args))


def run_check(args) -> int:
    from tools.offline_bundle.node import run_program

    dest = args.dir.absolute()
    return run_program(dest, ["tools.offline_bundle.check", "--dir", str(dest), *check_arguments(args)])


def check_arguments(args) -> list[str]:
    return ["--models", args.models, *(["--device", args.device] if args.device else [])]


def run_train(args) -> int:
    from tools.offline_bundle.node import installed_index, run_program

    dest = args.dir.absolute()
    installed_index(dest)
    for option, value in (("--minutes", args.minutes), ("--steps", args.steps), ("--stop-after", args.stop_after)):
        if value is not None and not value > 0:
            raise BundleError(f"{option} {value}: must be positive")
    if args.minutes and args.steps:
        raise BundleError("--minutes and --steps: give one of them")
    options = {
        "dest": str(dest), "models": [name for name in args.models.split(",") if name], "corpus": args.corpus,
        "minutes": args.minutes, "steps": args.steps, "stop_after": args.stop_after, "overrides": args.overrides,
        "evaluate": [str(path.absolute()) for path in args.evaluate],
        "exp": str(args.exp.absolute()) if args.exp else None,
    }
    return run_program(dest, ["tools.offline_bundle.train", json.dumps(options)])


def run_collect(args) -> int:
    from tools.offline_bundle.collect import collect

    collect(args.exp or args.dir / "exp", args.out, parse_size(args.part_size), args.files, not args.no_weights)
    return 0


def run_all(args) -> int:
    """Unpack, install, train, collect. What there is comes home also where the training was cut or a model failed."""
    from tools.offline_bundle.node import EXIT_DOUBTS

    args.dir = args.to
    if status := run_unpack(args):
        return status
    if (status := run_install(args)) not in (0, EXIT_DOUBTS):
        return status
    status = run_train(args)
    if any((args.exp or args.dir / "exp").glob("*/offline/plan.json")):
        run_collect(args)
    return status


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns 0, 1 for an error, 3 while parts are missing, 4 where the check worked though packages
    are not as they should be, 75 for a training that was cut."""
    args = command_line().parse_args(arguments)
    try:
        return args.run(args)
    except (BundleError, ManifestError, OSError) as error:
        print(f"{args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{args.command}: interrupted; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
