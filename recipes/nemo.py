"""Runs one of NeMo's own scripts with this project's classes registered.

    python -m recipes.nemo path/to/speech_to_text_eval.py model_path=x.nemo dataset_manifest=a.json

NeMo 3 refuses to build classes it does not know; upstream's scripts cannot know ours. The script runs as `python
path/to/script.py ARGS` would run it: as `__main__`, with its own folder first on the search path, its arguments in
sys.argv, its working folder and its exit status. For several processes use `torchrun -m recipes.nemo SCRIPT ARGS`.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

if not __package__:  # started by path: the project's root in place of this folder, whose nemo.py would hide NeMo
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from recipes.options import EXIT_USAGE, fail
from recipes.threads import set_threads

ROOT = str(Path(__file__).resolve().parent.parent)


def main(arguments: list[str] | None = None) -> None:
    """Runs the script named by the first argument; its SystemExit and its exceptions pass through."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return
    if not arguments:
        fail("recipes.nemo", "give the script to run: python -m recipes.nemo path/to/script.py ARGS", EXIT_USAGE)
    script = Path(arguments[0])
    if not script.is_file():
        reason = "is a folder" if script.is_dir() else "no such script"
        fail("recipes.nemo", f"{script}: {reason}; give the path of a Python file", EXIT_USAGE)
    set_threads()
    # Absolute, and after the script's folder: the script may change the working folder before it restores a model.
    sys.path[0] = ROOT
    sys.path.insert(0, str(script.resolve().parent))
    sys.argv = [str(script), *arguments[1:]]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
