"""python -m tools.histories list | run NAME... [--data MANIFEST --dev MANIFEST --out DIR --steps N --fixed]"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from manifests.schema import ManifestError
from recipes.config import ConfigError
from tools.histories.history import load, names, write_manifests

EXIT_CONFIG = 2


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m tools.histories", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the histories")
    run = commands.add_parser("run", help="train one or several and write OUT/NAME/history.md; a version that is "
                                          "complete there is not trained again")
    run.add_argument("names", nargs="+", metavar="NAME", help="of `list`, or all")
    run.add_argument("--data", default="data/librispeech_8h/train.json", help="manifest to train on")
    run.add_argument("--dev", default="data/librispeech_8h/dev.json", help="manifest to predict")
    run.add_argument("--hours", type=float, default=0.75, help="of the data, utterances of a history's durations")
    run.add_argument("--out", default="exp/histories", help="folder of the results")
    run.add_argument("--keep", help="folder that gets the small files too: history.md, curves.png, the curves")
    run.add_argument("--steps", type=int, help="in place of the history's own number")
    run.add_argument("--fixed", action="store_true", help="train the repaired version too")
    run.add_argument("--seconds", type=float, default=40.0, help="of the doctor, before and after each run")
    run.add_argument("--again", action="store_true",
                     help="ask the doctor anew, before and after, of broken versions that are complete")
    options = parser.parse_args(arguments)
    try:
        if options.command == "list":
            for name in names():
                history = load(name)
                print(f"{name}\n    ({history.reported}) {history.title}\n    {history.cause}")
            return 0
        return _run(options)
    except (ConfigError, ManifestError) as error:
        print(f"tools.histories: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_CONFIG


def _run(options) -> int:
    for key in ("data", "dev"):
        if not Path(getattr(options, key)).is_file():
            raise ConfigError(f"--{key} {getattr(options, key)}: no such file; `./run.sh --corpus librispeech_8h "
                              "--stop-stage 1` makes it")
    for key in ("steps", "hours", "seconds"):
        if getattr(options, key) is not None and not getattr(options, key) > 0:
            raise ConfigError(f"--{key} {getattr(options, key)}: must be above 0")
    chosen = [load(name) for name in (names() if options.names == ["all"] else options.names)]
    from recipes.quiet import quiet_imports
    from recipes.threads import set_threads

    set_threads()
    quiet_imports()
    from tools.histories import page
    from tools.histories.training import ask_again, known, train

    for history in chosen:
        out = Path(options.out).absolute() / history.name
        seen = {}
        command = ["python", "-m", "tools.histories", "run", history.name, *(["--fixed"] if options.fixed else [])]
        command += ["--steps", str(options.steps)] if options.steps else []
        for version in history.versions(options.fixed):
            folder = out / version
            folder.mkdir(parents=True, exist_ok=True)
            manifests = write_manifests(history, version, Path(options.data), Path(options.dev), folder, options.hours)
            print(f"{history.name}, {version}", flush=True)
            seen[version] = known(history, version, manifests, folder, options.steps)
            if seen[version] is None:
                seen[version] = train(history, version, manifests, folder, options.steps, options.seconds)
            elif options.again and version == "broken":
                seen[version] = ask_again(manifests, folder, seen[version], options.seconds)
            for stage, told in seen[version]["doctor"].items():
                print(f"   doctor {stage}: {told['verdict']}", flush=True)
            print(f"   {page.write(history, seen, out, shlex.join(command))}", flush=True)
        if options.keep:
            page.keep(out, Path(options.keep) / history.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
