"""Averages the best checkpoints of a run and saves the `.nemo`: `python -m recipes.average EXP --out EXP/model.nemo`.

Averaging the weights of the last good checkpoints is worth some tenths of a percent of WER and costs nothing at
run time (Izmailov et al. 2018, arXiv 1803.05407). It does not always win on a short run, so the average and the
best single checkpoint are both decoded on the validation manifest, and the better one is saved; what was compared
is written to `average.json` beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path

if not __package__:  # started by path: the project's root in place of this folder, whose nemo.py would hide NeMo
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from recipes.quiet import quiet_imports, quiet_nemo
from recipes.threads import set_threads


class AverageError(RuntimeError):
    """A run that has nothing to average. The message is one line."""


def best_checkpoints(folder: Path) -> list[Path]:
    """The top-k checkpoints of a run, best first, by what its configuration monitors; its last one where no name has that.

    Raises AverageError where there is none.
    """
    from omegaconf import OmegaConf

    checkpoints = sorted(folder.glob("checkpoints/*.ckpt"))
    if not checkpoints:
        raise AverageError(f"{folder}/checkpoints: no checkpoint; train first (stage 4)")
    cfg = OmegaConf.load(folder / "config.yaml") if (folder / "config.yaml").is_file() else OmegaConf.create()
    kept = OmegaConf.select(cfg, "exp_manager.checkpoint_callback_params") or {}
    monitor, mode = kept.get("monitor") or "val_wer", kept.get("mode") or "min"
    scored = []
    for path in checkpoints:
        match = re.search(rf"(?:^|-){re.escape(monitor)}=(-?[0-9.]+)-", path.name)
        if match and not path.name.endswith("-last.ckpt"):
            scored.append((float(match[1]) * (-1 if mode == "max" else 1), path.name, path))
    if scored:
        return [path for _, _, path in sorted(scored)]
    newest = max(checkpoints, key=lambda path: (path.name.endswith("-last.ckpt"), path.stat().st_mtime))
    print(f"   no checkpoint in {folder}/checkpoints has {monitor} in its name: {newest.name}, the newest, is taken",
          flush=True)
    return [newest]


def state_of(path: Path) -> dict:
    """The weights of a Lightning checkpoint of ours. A checkpoint is a pickle: load only your own."""
    import torch

    return torch.load(path, map_location="cpu", weights_only=False, mmap=True)["state_dict"]


def average(states: list[dict]) -> dict:
    """Element-wise mean of state dicts in float64; whole numbers (counters) are those of the first."""
    import torch

    mean = {}
    for key, first in states[0].items():
        if torch.is_floating_point(first):
            mean[key] = (sum(state[key].double() for state in states) / len(states)).to(first.dtype)
        else:
            mean[key] = first.clone()
    return mean


def word_error_rate(model, rows: list[dict]) -> float:
    """Greedy WER on manifest rows with resolved audio paths."""
    from recipes.decode import Decoder
    from recipes.metrics import count_errors

    hypotheses = Decoder(model, rows).run()
    return count_errors([row["text"] for row in rows], hypotheses)[0].rate


def save_best(folder: Path, out: Path) -> dict:
    """Writes `out` (.nemo) and average.json; returns what the latter holds. Raises AverageError."""
    from omegaconf import OmegaConf

    from recipes.data import read_rows
    from recipes.decode import pick_device
    from recipes.train import build_model

    if not (folder / "config.yaml").is_file():
        raise AverageError(f"{folder}/config.yaml: no such file; train first (stage 4)")
    cfg = OmegaConf.load(folder / "config.yaml")
    paths = best_checkpoints(folder)
    cfg.init_from = None
    model = build_model(cfg).to(pick_device())
    quiet_nemo()
    rows = read_rows(OmegaConf.to_container(cfg.model.validation_ds)["manifest_filepath"])
    states = [state_of(path) for path in paths]
    candidates = {paths[0].name: states[0]}
    if len(states) > 1:
        candidates[f"average of {len(states)}"] = average(states)
    measured = {}
    for name, state in candidates.items():
        model.load_state_dict(state)
        measured[name] = word_error_rate(model, rows)
        print(f"   validation WER {measured[name]:.2%}  {name}", flush=True)
    chosen = min(measured, key=measured.get)
    model.load_state_dict(candidates[chosen])
    model.cpu()
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".part-{out.name}")
    model.save_to(str(part))
    os.replace(part, out)
    result = {
        "chosen": chosen,
        "validation_wer": measured,
        "checkpoints": [path.name for path in paths],
        "model": str(out),
    }
    (out.parent / "average.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"   saved {chosen} as {out}")
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="recipes/average.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exp", type=Path, help="folder of a run, with config.yaml and checkpoints/")
    parser.add_argument("--out", type=Path, required=True, help="the .nemo to write")
    args = parser.parse_args(arguments)
    set_threads()
    quiet_imports()
    from manifests.schema import ManifestError
    from recipes.config import ROOT, ConfigError
    from recipes.decode import AudioError, ModelError

    exp, out = args.exp.resolve(), args.out.resolve()
    os.chdir(ROOT)  # a run's configuration names its manifests from there, as in training
    try:
        save_best(exp, out)
    except (AudioError, AverageError, ConfigError, ManifestError, ModelError, OSError) as error:
        print(f"average.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
