"""The small pretrained models of this repository: from a run's `.nemo` to one that git can hold, and by name.

    python -m recipes.pretrained exp/deepspeech2_librispeech_8h/deepspeech2.nemo --name deepspeech2

writes `recipes/deepspeech2/pretrained/deepspeech2.nemo`: matrices in float16, vectors (biases, normalisations and their
statistics) as they are, nothing in its configuration that names a folder of the machine it was trained on. It is a
`.nemo` like any other: `ASRModel.restore_from` reads it and computes in float32. Where an option of ours asks for a
model, `model=deepspeech2` is this one.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if not __package__:  # started by path: the project's root in place of this folder, whose nemo.py would hide NeMo
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

HERE = Path(__file__).resolve().parent
FOLDERS = {
    "deepspeech": "deepspeech", "deepspeech2": "deepspeech2", "conformer": "conformer", "conformer_bpe": "conformer"
}
LARGEST = 10 * 2**20  # bytes of one file in git


class PretrainedError(RuntimeError):
    """A model that cannot be kept here. The message is one line."""


def pretrained_path(name: str) -> Path:
    """Where the pretrained model of a recipe lies, whether it is there or not. Raises KeyError for another name."""
    return HERE / FOLDERS[name] / "pretrained" / f"{name}.nemo"


def save_small(source: Path, out: Path) -> int:
    """Writes `source` (.nemo) in float16 as `out`; returns its bytes. Raises PretrainedError where it is too large."""
    from omegaconf import open_dict

    from recipes.decode import load_model

    model = load_model(source, device="cpu")
    for parameter in model.parameters():
        half = parameter.data.half()
        if parameter.ndim >= 2 and bool(half.isfinite().all()):  # over 65,504 it would be infinity
            parameter.data = half
    with open_dict(model.cfg):
        for section in ("train_ds", "validation_ds", "test_ds"):
            model.cfg.pop(section, None)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".part-{out.name}")
    try:
        model.save_to(str(part))
        size = part.stat().st_size
        if size > LARGEST:
            raise PretrainedError(
                f"{source}: {size / 2**20:.1f} MiB in float16, {LARGEST // 2**20} MiB at most; train with size=medium"
            )
        os.replace(part, out)
    finally:
        part.unlink(missing_ok=True)
    return size


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="recipes/pretrained.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the .nemo of a run")
    parser.add_argument("--name", required=True, choices=sorted(FOLDERS), help="the recipe")
    parser.add_argument("--out", type=Path, help="by default its place in this repository")
    args = parser.parse_args(arguments)

    from recipes.decode import ModelError
    from recipes.options import UsageError, existing_model
    from recipes.quiet import quiet_imports

    quiet_imports()
    out = args.out or pretrained_path(args.name)
    try:
        size = save_small(existing_model(args.model), out)
    except (PretrainedError, ModelError, UsageError) as error:
        print(f"pretrained.py: {error}", file=sys.stderr)
        return 1
    print(f"{out}: {size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
