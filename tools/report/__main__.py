"""Writes report.md and curve.png of a run: `python -m tools.report exp/deepspeech2_mini`.

`--publish recipes/deepspeech2/results --command "./run.sh"` also keeps what belongs into the repository: the curve as
CSV and PNG, and a JSON of the error counts with command, commit and hardware, without any path of this machine.

Reads evaluation/metrics.json with its predictions, curve.csv, check/one_batch.json and average.json of the run's
folder; what is not there is left out. The page with findings and plots is the doctor's.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from manifests.schema import ManifestError, read_manifest, write_atomic
from recipes.processor import processor
from recipes.threads import usable_cores
from tools.report.curve import draw, read_curve

ROOT = Path(__file__).resolve().parents[2]
PAIRS = 3  # transcripts shown of each manifest


def clock(seconds: float) -> str:
    """8 min 05 s."""
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


def error_table(metrics: dict) -> list[str]:
    """Markdown rows of WER and CER by manifest, and over all of them."""
    lines = [
        "| test set | utterances | WER % | 95 % interval | CER % | subs | dels | ins | words |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for part in [*metrics["manifests"], {**metrics["overall"], "name": "all"}]:
        if part["words"] is None:
            continue
        low, high = part["wer_interval"] or (float("nan"), float("nan"))
        words = part["words"]
        lines.append(
            f"| {part['name']} | {part['utterances']} | {100 * part['wer']:.2f} | "
            f"{100 * low:.2f} to {100 * high:.2f} | {100 * part['cer']:.2f} | {words['substitutions']} | "
            f"{words['deletions']} | {words['insertions']} | {words['reference']} |"
        )
    return lines


def unit(folder: Path) -> str:
    """What the losses of a run are a share of: `token` where its configuration has a tokenizer, else `character`."""
    return "token" if configuration(folder).get("model", {}).get("tokenizer") else "character"


def training(folder: Path) -> list[str]:
    """Lines on how the run went, from curve.csv."""
    columns = read_curve(folder / "curve.csv")
    lines = []
    if "seconds" in columns and "loss_per_char" in columns:
        step, seconds = columns["seconds"][-1]
        speed = [value for _, value in columns.get("audio_seconds_per_second", [])]
        loss = columns["loss_per_char"][-1][1]
        lines.append(
            f"Trained {int(step)} steps in {clock(seconds)}, "
            f"{sum(speed) / max(len(speed), 1):.0f} s of audio a second, final loss {loss:.3f} nats a {unit(folder)}."
        )
    return lines


def transcripts(metrics: dict, folder: Path) -> list[str]:
    """Reference and hypothesis of a few utterances of each manifest, spread over it; `folder` holds the predictions
    of a run that came from elsewhere."""
    lines = []
    for part in metrics["manifests"]:
        path = Path(part["predictions"])
        rows = [row for row in read_manifest(path if path.is_file() else folder / path.name) if row["text"]]
        lines.append(f"{part['name']}:")
        for at in range(min(PAIRS, len(rows))):
            row = rows[(2 * at + 1) * len(rows) // (2 * PAIRS)]
            lines += [f"  reference   {row['text']}", f"  hypothesis  {row['pred_text']}"]
    return lines


def report(folder: Path) -> Path:
    """Writes report.md and curve.png into the run's folder; returns the former's path. Raises OSError, ValueError."""
    _there(folder, "curve.csv", "has not been trained", "./run.sh --stage 4, or name another folder")
    lines = [f"# {folder.name}", ""]
    lines += training(folder)
    draw({folder.name: folder / "curve.csv"}, folder / "curve.png", unit(folder))
    if (folder / "check" / "one_batch.json").is_file():
        batch = json.loads((folder / "check" / "one_batch.json").read_text())["batch"]
        lines.append(f"One batch of {batch['utterances']} utterances was learned by heart in {batch['step']} steps.")
    if (folder / "average.json").is_file():
        lines.append(f"Saved weights: {json.loads((folder / 'average.json').read_text())['chosen']}.")
    metrics_path = folder / "evaluation" / "metrics.json"
    if metrics_path.is_file():
        metrics = json.loads(metrics_path.read_text())
        _own(folder, metrics)
        lines += ["", *error_table(metrics), "", "```", *transcripts(metrics, metrics_path.parent), "```"]
    weights = sorted(path.name for path in folder.glob("[!.]*.nemo"))
    kept = ["config.yaml", "curve.csv", "curve.png", "evaluation", *weights]
    outputs = [name for name in kept if (folder / name).exists()]
    lines += ["", f"Outputs in `{folder}`: {', '.join(outputs)}."]
    out = folder / "report.md"
    write_atomic(out, ("\n".join(lines) + "\n").encode())
    return out


def _there(folder: Path, name: str, what: str, remedy: str) -> None:
    """Raises ValueError where a run's folder lacks a file, with what that means and what makes it."""
    if not (folder / name).is_file():
        missing = f"no {name}: this run {what}" if folder.is_dir() else "there is no such folder"
        raise ValueError(f"{folder}: {missing} ({remedy})")


def configuration(folder: Path) -> dict:
    """What a run's config.yaml holds, nothing where there is none."""
    import yaml

    return yaml.safe_load((folder / "config.yaml").read_text()) if (folder / "config.yaml").is_file() else {}


def evaluated(folder: Path) -> tuple[dict, dict]:
    """Configuration and metrics of a run. Raises ValueError, with the remedy, where it has not been evaluated on its own
    test manifests."""
    _there(folder, "evaluation/metrics.json", "has not been evaluated", "./run.sh --stage 6")
    _there(folder, "config.yaml", "has no configuration", "train it with recipes/train.py")
    metrics = json.loads((folder / "evaluation" / "metrics.json").read_text())
    _own(folder, metrics)
    return configuration(folder), metrics


def _own(folder: Path, metrics: dict) -> None:
    """Raises ValueError where the metrics are of other manifests than the run's test manifests: `all` would be of them.

    A node of tools.offline_bundle evaluates on what its plan says.
    """
    named = (configuration(folder).get("corpus") or {}).get("test") or []
    tests = [Path(test) for test in ([named] if isinstance(named, str) else named)]
    measured = [Path(part["manifest"]) for part in metrics["manifests"] if "manifest" in part]
    if not tests or not measured or elsewhere(folder):
        return

    def same(manifest: Path, test: Path) -> bool:  # the run may have been moved, or evaluated on another machine
        return manifest == (ROOT / test).resolve() or manifest.parts[-len(test.parts):] == test.parts

    other = [manifest for manifest in measured if not any(same(manifest, test) for test in tests)]
    left_out = [test for test in tests if not any(same(manifest, test) for manifest in measured)]
    if other or left_out:
        what = f"also of {other[0]}" if other else f"not of {left_out[0]}"
        raise ValueError(
            f"{folder}/evaluation/metrics.json is {what}, and the run's test manifests (corpus.test) are "
            f"{', '.join(map(str, tests))}: evaluate it on these, ./run.sh --stage 6 --force with the run's other options"
        )


def result_name(config: dict, results: Path) -> str:
    """The corpus, with the recipe before it where `results` lies in another recipe's folder (conformer_bpe)."""
    recipe, corpus = config["name"], config["corpus"]["name"]
    return corpus if recipe == results.resolve().parent.name else f"{recipe}_{corpus}"


def publish(folder: Path, results: Path, command: str) -> Path:
    """Copies the curve and the error counts of a reported run to `results/<corpus>.*`; returns the JSON's path.

    Corpus and recipe are what the run's configuration names; where the folder belongs to another recipe (conformer_bpe
    in conformer/), the name is `<recipe>_<corpus>`. Raises OSError, KeyError or ValueError where the run has not been
    evaluated and reported.
    """
    config, metrics = evaluated(folder)
    name = result_name(config, results)
    kept = {"recipe": config["name"], "corpus": config["corpus"]["name"], "command": command}
    kept |= {"commit": commit(folder), "hardware": hardware(folder)}
    kept |= {key: metrics[key] for key in ("parameters", "decoding", "normalisation", "interval", "overall")}
    kept["manifests"] = [
        {key: value for key, value in part.items() if key not in ("manifest", "predictions", "duration_off")}
        for part in metrics["manifests"]
    ]
    results.mkdir(parents=True, exist_ok=True)
    for suffix in (".csv", ".png"):
        shutil.copyfile(folder / f"curve{suffix}", results / f"{name}{suffix}")
    out = results / f"{name}.json"
    write_atomic(out, (json.dumps(kept, indent=1) + "\n").encode())
    return out


def commit(folder: Path | None = None) -> str:
    """Short hash of what trained `folder`: as exp_manager wrote it down there, with "+" where tracked files differed.

    Of the checkout as it is now where the run left no note; "unknown" outside git.
    """
    if found := elsewhere(folder).get("commit"):
        return found[:7]
    note = folder / "git-info.log" if folder else None
    if note and note.is_file():
        found = re.match(r"commit hash: ([0-9a-f]{7})[0-9a-f]*\n(.*)", note.read_text(), re.DOTALL)
        if found:
            return found[1] + ("+" if "diff --git" in found[2] else "")
    try:
        named = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return named.stdout.strip()


def elsewhere(folder: Path | None) -> dict:
    """What a node of tools.offline_bundle noted of a run that it trained and sent home, else nothing."""
    note = folder / "offline" / "plan.json" if folder else None
    return json.loads(note.read_text()) if note and note.is_file() else {}


def hardware(folder: Path | None = None) -> str:
    """What `folder` was trained on where a node noted it; else processor and cores as Linux names them, or the GPU
    where there is one."""
    if found := elsewhere(folder).get("hardware"):
        return found
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        gpus = subprocess.run(query, capture_output=True, text=True)
        if gpus.returncode == 0 and gpus.stdout.strip():
            return ", ".join(gpus.stdout.split("\n")).strip(", ")
    return f"{usable_cores()} cores of {processor()}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exp", type=Path, help="folder of a run")
    parser.add_argument("--publish", type=Path, metavar="DIR", help="also keep curve and error counts in this folder")
    parser.add_argument("--command", help="with --publish: the command that trained")
    args = parser.parse_args(arguments)
    if bool(args.publish) != bool(args.command):
        parser.error("--publish and --command belong together: a result without its command cannot be repeated")
    try:
        print(report(args.exp))
        if args.publish:
            print(publish(args.exp, args.publish, args.command))
    except (OSError, ValueError, KeyError, ManifestError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
