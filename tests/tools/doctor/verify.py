"""Shows, without the doctor, that each fault harms and each healthy set-up is sane; writes harm.md beside it.

    python -m tests.tools.doctor.verify [NAME ...]

A model is trained as its configuration says (rate, schedule, clipping; at most STEPS steps) and scored on clean
utterances; its healthy twin, the same kind of set-up without the change, likewise.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
import traceback
from pathlib import Path

from recipes.threads import set_threads

set_threads()

from tests.tools.doctor.faults import faults, healthy  # noqa: E402

STEPS = 100
# Where training goes on as if nothing were wrong: what the harm is instead.
ELSEWHERE = {
    "leaked_test": "24 test utterances are trained on: the test says nothing",
    "leaked_copies": "24 test utterances are trained on: the test says nothing",
    "doubled_manifest": "an epoch has twice the steps that its schedule was made for",
    "wer_averaged_over_batches": "the WER shown is not that of the corpus",
    "dev_in_single_letters": "the dev texts are not spelt as the model's",
    "encoder_group_of_another_rate": "here all parameters learn at one rate",
    "slow_disk": "the processor waits",
    "after_cut_off": "nothing was learned yet",
}
HERE = Path(__file__).parent


def describe(losses: list[float]) -> str:
    if not losses:
        return "no step"
    last = losses[-10:]
    bad = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
    line = f"loss {losses[0]:.2f} to {sum(last) / len(last):.2f}"
    return line if bad is None else f"{line}, not finite from step {bad + 1}"


def factor(config):
    """The schedule of an `optim` section as a function of the step, in multiples of its `lr`, as NeMo has it."""
    import torch
    from nemo.core.optim.lr_scheduler import prepare_lr_scheduler
    from omegaconf import OmegaConf

    optim, trainer = config.model.optim, config.trainer
    lr = float(optim.lr)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr or 1e-30)
    section = OmegaConf.to_container(optim.sched, resolve=True)
    section.setdefault("max_steps", int(trainer.max_steps))
    schedule = prepare_lr_scheduler(optimizer, OmegaConf.create(section))["scheduler"]
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return lambda step: rates[step] / (lr or 1e-30)


def train_as_written(config, rows):
    """A model of this configuration after at most STEPS of its steps, its losses and its error."""
    import torch

    from tests.tools.doctor.setups import learning, models

    recipe = "recipes." in str(config.model.encoder.get("_target_"))
    if recipe:
        from recipes.train import build_model

        model = build_model(config)
    else:
        from omegaconf import OmegaConf

        model = models.build(OmegaConf.to_container(config.model, resolve=True))
    optim = config.model.optim
    lr, decay = float(optim.lr), float(optim.get("weight_decay") or 0)
    trained = [p for p in model.parameters() if p.requires_grad]
    if optim.name == "sgd":
        optimizer = torch.optim.SGD(trained, lr=lr, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(trained, lr=lr, betas=tuple(optim.get("betas", (0.9, 0.98))), weight_decay=decay)
    steps = min(STEPS, int(config.trainer.max_steps))
    schedule = None if recipe else factor(config)
    losses = learning.learn(model, rows, steps, optimizer=optimizer, schedule=schedule,
                            clip=config.trainer.get("gradient_clip_val"))
    return model, losses


def measure(item, folder: Path) -> str:
    """One line: what became of training."""
    from omegaconf import OmegaConf

    from tests.tools.doctor.setups import learning, tones

    clean = tones.corpus(folder / "clean", count=16, seed=7, name="clean")
    if item.run is not None:
        from tests.tools.doctor.setups.runs import Losses

        losses = Losses()
        model, error = item.run(folder, [losses])
        line = describe(losses.values) + (f"; ended by {error[:160]}" if error else "")
        return line + f"; CER {score(model, clean)}"
    given = item.make(folder)
    if item.stage == "after":
        return after(Path(given["run"]))
    if "manifests" not in given:
        return "no manifest: see its file"
    rows = tones.read(given["manifests"]["train"][0])
    if "model" in given and not isinstance(given["model"], str):
        model = given["model"]
        losses = learning.learn(model, rows, STEPS)
        return f"{describe(losses)}; CER {score(model, clean)}"
    if "config" not in given:
        return f"{len(rows)} rows"
    config = given["config"]
    config = OmegaConf.load(config) if isinstance(config, str) else OmegaConf.create(config)
    if "global_batch_seconds" in str(config):
        from omegaconf import open_dict

        from recipes.train import fill_in

        with open_dict(config):
            fill_in(config)
    model, losses = train_as_written(config, rows)
    return f"{describe(losses)}; {config.trainer.max_steps} steps in all; CER {score(model, clean)}"


def score(model, rows) -> str:
    """Character error rates in batches of 16, one by one, and behind six seconds of padding."""
    from tests.tools.doctor.setups import learning

    try:
        together, alone = (learning.character_errors(model, rows, size) for size in (16, 1))
        padded = learning.character_errors(model, rows, 16, padding=6.0)
        return f"{together:.2f}, one by one {alone:.2f}, with 6 s of padding {padded:.2f}"
    except Exception as error:
        return f"cannot be had: {type(error).__name__}: {str(error).splitlines()[0][:100]}"


def after(run: Path) -> str:
    from tests.tools.doctor.setups.runs import curve

    parts = []
    if (run / "curve.csv").is_file():
        rows = curve(run)
        train = [float(row["loss_per_char"]) for row in rows if row["loss_per_char"]]
        held = [(float(row["val_loss"]), float(row["val_cer"])) for row in rows if row["val_loss"]]
        ends = f"{train[0]:.2f} to {train[-1]:.2f}" if train else "of no step"
        parts.append(f"loss a character {ends} over {rows[-1]['step']} steps")
        if held:
            best = min(held)
            parts.append(f"validation {best[0]:.2f} at best, {held[-1][0]:.2f} at the end, CER {held[-1][1]:.2f}")
    for name in ("error.txt", "true_wer.txt"):
        if (run / name).is_file():
            parts.append((run / name).read_text().strip().splitlines()[0][:160])
    return "; ".join(parts) or "only logs: " + ", ".join(sorted(p.name for p in run.iterdir()))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.tools.doctor.verify", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="faults or healthy set-ups; all where none is given")
    parser.add_argument("--out", type=Path, help="markdown to write, e.g. tests/tools/doctor/harm.md")
    args = parser.parse_args()
    lines = []
    chosen = [*(("fault", item) for item in faults()), *(("healthy", item) for item in healthy())]
    if args.names:
        chosen = sorted((c for c in chosen if c[1].name in args.names), key=lambda c: args.names.index(c[1].name))
    for kind, item in chosen:
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                line = measure(item, Path(folder))
            except Exception as error:
                line = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                if args.names:
                    traceback.print_exc()
        if item.name in ELSEWHERE:
            line = f"{line}; {ELSEWHERE[item.name]}"
        lines.append((kind, item.name, item.stage, line.replace("|", "/")))
        print(f"{kind} {item.name} ({item.stage}, {time.perf_counter() - begin:.0f} s): {line}", flush=True)
    if args.out:
        table = "".join(f"| {kind} | {name} | {stage} | {line} |\n" for kind, name, stage, line in lines)
        args.out.write_text(
            f"What training makes of each set-up, without the doctor (`python -m tests.tools.doctor.verify`, at most "
            f"{STEPS} steps of a tiny model on a CPU).\n\n| kind | name | stage | measured |\n|---|---|---|---|\n"
            + table
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
