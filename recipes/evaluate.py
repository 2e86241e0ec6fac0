"""Word and character error rates of a model on manifests, by greedy decoding.

    python recipes/evaluate.py model=x.nemo manifests=[a.json,b.json]

Writes to the output folder, by default one beside the model that is named after the manifests, `predictions_NAME.json`
for each manifest (its rows, in its order, with `pred_text`) and one `metrics.json`; prints a table and some
reference/hypothesis pairs. A manifest without `text` gets predictions only.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Optional

if not __package__:  # started by path: the project's root in place of this folder, whose nemo.py would hide NeMo
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from manifests.schema import ManifestError, iter_manifest, resolve_audio, show, write_atomic, write_manifest
from manifests.shards_format import IN_SHARDS, is_sharded
from manifests.validate import DURATION_TOLERANCE
from recipes.options import (
    EXIT_FAILED, EXIT_USAGE, PRECISIONS, UsageError, existing_model, fail, known, option, parse, path_list, positive,
    required,
)
from recipes.pretrained import FOLDERS, pretrained_path
from recipes.quiet import quiet_imports
from recipes.threads import set_threads

ROOT = Path(__file__).resolve().parent.parent
NORMALISATION = (
    "references and hypotheses alike: lower case, Unicode NFKC, every kind of apostrophe as ', white space collapsed "
    "(manifests.text.normalize)"
)
INTERVAL = "95 % bootstrap over utterances, 1000 draws, seed 0"


@dataclass
class Options:
    """What `python recipes/evaluate.py` takes."""

    model: str = required(".nemo file, Lightning .ckpt, or a recipe's name for its pretrained one")
    manifests: Any = required("one manifest or a list, [a.json,b.json]")
    names: Any = option("labels for the manifests in the table and in file names, by default the file names", None)
    output: Optional[str] = option("folder for predictions and metrics, by default evaluation/NAMES beside the model", None)
    batch_seconds: Optional[float] = option("padded seconds of audio in a batch, by default by the device", None)
    device: str = option("auto, cpu, cuda or cuda:N", "auto")
    precision: str = option("32, or bf16-mixed: faster where the processor or GPU has bfloat16", "32")
    num_workers: Optional[int] = option("batches at once on a CPU, reading threads beside a GPU", None)
    pairs: int = option("reference/hypothesis pairs to print", 5)


@dataclass
class EvaluationSet:
    """One manifest to evaluate: rows as they stand in it, their lines, and where their audio is."""

    name: str
    path: Path
    rows: list[dict]
    lines: list[int]
    audio: list[str]

    @property
    def has_text(self) -> bool:
        return "text" in self.rows[0]

    @property
    def seconds(self) -> float:
        return sum(row["duration"] for row in self.rows)


def read_set(path: Path, name: str) -> EvaluationSet:
    """A manifest, checked: every row has audio that is there, and all rows or none have text.

    Raises ManifestError naming file, line and value.
    """
    read = list(iter_manifest(path, required=("audio_filepath", "duration")))
    found = EvaluationSet(name, path, [row for _, row in read], [line for line, _ in read], [])
    without = [line for line, row in read if "text" not in row]
    if 0 < len(without) < len(read):
        raise ManifestError(
            f"{path}:{without[0]}: no text, as on {len(without)} of {len(read)} lines: give a text to all lines "
            "(\"\" for silence), or to none to get predictions only"
        )
    found.audio = [str(resolve_audio(row, path)) for row in found.rows]
    files = [os.path.dirname(audio) if is_sharded(row) else audio for row, audio in zip(found.rows, found.audio)]
    missing = [i for i, file in enumerate(files) if not os.path.isfile(file)]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise ManifestError(
            f"{path}:{found.lines[missing[0]]}: no audio file {show(files[missing[0]], 300)}{more}: "
            "correct the path or build the manifest again"
        )
    return found


def read_sets(manifests, names=None) -> list[EvaluationSet]:
    """The manifests as evaluation sets with distinct names. Raises ManifestError and UsageError."""
    paths = path_list("manifests", manifests)
    for path in paths:
        if not path.is_file():
            hint = "; for several write manifests=[a,b]" if "," in str(path) else ""
            raise UsageError(f"manifests={path}: no such file{hint}")
    if names is None:
        names = [path.stem for path in paths]
        if len(set(names)) < len(names):  # the same file name in several folders
            names = [f"{path.resolve().parent.name}_{path.stem}" for path in paths]
    else:
        names = [str(name) for name in ([names] if isinstance(names, str) else names)]
    if len(names) != len(paths):
        raise UsageError(f"names={names}: {len(names)} names for {len(paths)} manifests")
    for name in names:
        if not name or name != Path(name).name:
            raise UsageError(f"names: {name!r} cannot be part of a file name; give names=[...] without slashes")
    if len(set(names)) < len(names):
        raise UsageError(f"names {names} are not distinct; give names=[...]")
    return [read_set(path, name) for path, name in zip(paths, names)]


def default_output(model: Path, names: list[str]) -> Path:
    """Where the evaluation of a model goes that is told no folder: one for these sets, beside the model.

    What is right in evaluation/ is run.sh's, of all the run's test sets. Beside pretrained weights lie the repository's
    own files: their evaluations go to exp/.
    """
    sets = "+".join(names)
    if len(sets) > 100:  # a file name has its limits
        sets = f"{sets[:80]}-{hashlib.sha256(sets.encode()).hexdigest()[:8]}"
    if model.resolve() in [pretrained_path(name).resolve() for name in FOLDERS]:
        return ROOT / "exp" / f"{model.stem}_pretrained" / "evaluation" / sets
    return model.parent / "evaluation" / sets


def evaluate_model(model, manifests, *, output=None, names=None, batch_seconds: float | None = None,
                   precision: str = "32", num_workers: int | None = None, progress: bool = True, model_path=None) -> dict:
    """Decodes the manifests greedily and returns the metrics; writes them and the predictions where `output` is given.

    Args:
        model: a NeMo model with a CTC head; its mode, device and settings are afterwards as before.
        manifests: path, list of paths, or list of EvaluationSet.
        output: folder for predictions_NAME.json and metrics.json.
        names: labels of the manifests, by default their file names.
        batch_seconds, precision, num_workers: see recipes.decode.Decoder.
        progress: a bar in seconds of audio, on stderr.

    Returns a dict: `manifests` (a list of results in order), `overall`, and how they were measured. A result has
    `wer`, `cer` (0 to above 1, None without text), `wer_interval` (low, high), `words` and `characters`
    (substitutions, deletions, insertions, reference), `utterances`, `hours` (of the audio read, whatever the manifest
    says), `seconds` (wall, without loading the model), `real_time_factor` (seconds per second of audio),
    `durations_off` (how many the manifest has wrong) and `duration_off` (the first of them, in words, or None).

    Raises ManifestError for a manifest or audio that cannot be used, UsageError for names.
    """
    from tqdm import tqdm

    from recipes.decode import AudioError, Decoder

    ready = isinstance(manifests, list) and all(isinstance(one, EvaluationSet) for one in manifests)
    sets = manifests if ready else read_sets(manifests, names)
    results, texts = [], []
    total = round(sum(one.seconds for one in sets))
    shown = {"unit": "s", "unit_scale": True, "desc": "seconds of audio", "leave": False, "disable": not progress}
    with tqdm(total=total, **shown) as bar:
        for one in sets:
            rows = [{**row, "audio_filepath": audio} for row, audio in zip(one.rows, one.audio)]
            decoder = Decoder(
                model, rows, batch_seconds=batch_seconds, precision=precision, num_workers=num_workers,
                on_audio=bar.update,
            )
            try:
                hypotheses = decoder.run()
            except AudioError as error:
                raise ManifestError(f"{one.path}:{one.lines[error.index]}: {error}") from error
            results.append({**_result(one, hypotheses, decoder), "too_short": len(decoder.short)})
            texts.append(hypotheses)
    metrics = {
        "model": str(Path(model_path).resolve()) if model_path else None,
        "model_class": f"{type(model).__module__}.{type(model).__qualname__}",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "device": str(next(model.parameters()).device),
        "decoding": "greedy CTC",
        "precision": precision,
        "normalisation": NORMALISATION,
        "interval": INTERVAL,
        "manifests": results,
        "overall": _overall(sets, texts, results),
    }
    if output is not None:
        folder = Path(output)
        for one, hypotheses, result in zip(sets, texts, results):
            predictions = folder / f"predictions_{one.name}.json"
            write_predictions(predictions, one, hypotheses)
            result["predictions"] = str(predictions.resolve())
        # Last: where there is a metrics.json, the predictions that it speaks of are there too.
        write_atomic(folder / "metrics.json", (json.dumps(metrics, indent=2, ensure_ascii=False) + "\n").encode())
    metrics["pairs"] = [
        {"utterance": str(row.get("utterance") or Path(row["audio_filepath"]).stem), "reference": row["text"],
         "hypothesis": hypothesis}
        for one, hypotheses in zip(sets, texts) if one.has_text for row, hypothesis in zip(one.rows, hypotheses)
    ]
    return metrics


def _result(one: EvaluationSet, hypotheses: list[str], decoder) -> dict:
    scores = _scores([row["text"] for row in one.rows] if one.has_text else None, hypotheses)
    cost = _cost(sum(decoder.audio_seconds), decoder.seconds)
    wrong = [i for i, (row, seconds) in enumerate(zip(one.rows, decoder.audio_seconds))
             if abs(row["duration"] - seconds) > DURATION_TOLERANCE]
    first = None
    if wrong:
        i = wrong[0]
        said, read = one.rows[i]["duration"], decoder.audio_seconds[i]
        first = f"{one.path}:{one.lines[i]} says {said} s of {read:.3f} s"
    return {"name": one.name, "manifest": str(one.path.resolve()), **scores, **cost, "durations_off": len(wrong),
            "duration_off": first}


def _overall(sets: list[EvaluationSet], texts: list[list[str]], results: list[dict]) -> dict:
    with_text = [(one, hypotheses) for one, hypotheses in zip(sets, texts) if one.has_text]
    references = [row["text"] for one, _ in with_text for row in one.rows] if with_text else None
    scores = _scores(references, [text for _, hypotheses in with_text or zip(sets, texts) for text in hypotheses])
    scores["utterances"] = sum(len(one.rows) for one in sets)
    scores["empty_hypotheses"] = sum(result["empty_hypotheses"] for result in results)
    hours, seconds = (sum(result[key] for result in results) for key in ("hours", "seconds"))
    return {**scores, **_cost(3600 * hours, seconds)}


def _scores(references: list[str] | None, hypotheses: list[str]) -> dict:
    from recipes.metrics import bootstrap_interval, count_errors, utterance_errors

    scores = {"utterances": len(hypotheses), "empty_hypotheses": sum(not text.strip() for text in hypotheses)}
    if references is None:
        return {**scores, "wer": None, "cer": None, "wer_interval": None, "words": None, "characters": None}
    words, characters = count_errors(references, hypotheses)
    return {
        **scores,
        "wer": words.rate,
        "cer": characters.rate,
        "wer_interval": bootstrap_interval(*utterance_errors(references, hypotheses)),
        "words": asdict(words),
        "characters": asdict(characters),
    }


def _cost(audio_seconds: float, seconds: float) -> dict:
    return {
        "hours": audio_seconds / 3600,
        "seconds": round(seconds, 3),
        "real_time_factor": seconds / max(audio_seconds, 1e-9),
    }


def write_predictions(path: Path, one: EvaluationSet, hypotheses: list[str]) -> None:
    """The set's rows in their order with `pred_text`; relative audio paths are made to hold from the new folder.

    Rows of shards are found beside their manifest only: they keep the name in the tar and lose the place in it.
    """
    folder = os.path.realpath(path.parent)
    rows = []
    for row, audio, hypothesis in zip(one.rows, one.audio, hypotheses):
        written = row["audio_filepath"]
        if is_sharded(row):
            row = {key: value for key, value in row.items() if key not in IN_SHARDS}
        elif not os.path.isabs(written):
            written = os.path.relpath(os.path.realpath(audio), folder)
        rows.append({**row, "audio_filepath": written, "pred_text": hypothesis})
    write_manifest(path, rows, required=("audio_filepath", "duration"))


def table(metrics: dict) -> str:
    """The metrics as a table for people, one line a manifest and one for all."""
    lines = [f"{'manifest':<24} {'utts':>6} {'hours':>7} {'WER %':>7} {'95 % interval':>15} {'CER %':>7} "
             f"{'subs':>6} {'dels':>6} {'ins':>6} {'words':>7} {'x real time':>11}"]
    results = [*metrics["manifests"], {**metrics["overall"], "name": "all"}]
    for result in results if len(results) > 2 else results[:1]:
        line = f"{result['name']:<24} {result['utterances']:>6} {result['hours']:>7.2f} "
        if result["words"] is None:
            line += f"{'no text: predictions only':<58} "
        else:
            low_high = result["wer_interval"]
            interval = f"{100 * low_high[0]:.2f} - {100 * low_high[1]:.2f}" if low_high else "-"
            words = result["words"]
            line += f"{100 * result['wer']:>7.2f} {interval:>15} {100 * result['cer']:>7.2f} "
            line += "".join(f"{words[kind]:>6} " for kind in ("substitutions", "deletions", "insertions"))
            line += f"{words['reference']:>7} "
        lines.append(f"{line}{1 / max(result['real_time_factor'], 1e-9):>11.1f}")
    return "\n".join(lines)


def report(metrics: dict, pairs: int = 5) -> str:
    """Table, normalisation, notes and `pairs` reference/hypothesis pairs spread evenly over the manifests."""
    lines = [table(metrics), f"normalisation: {metrics['normalisation']}"]
    for result in metrics["manifests"]:
        name, count = result["name"], result["utterances"]
        if result["durations_off"]:
            lines.append(f"{name}: {result['durations_off']} of {count} durations are off by more than "
                         f"{DURATION_TOLERANCE} s, {result['duration_off']}; hours and speed are by the audio")
        if result["too_short"]:
            lines.append(f"{name}: {result['too_short']} utterances under two feature frames: empty hypothesis")
        if result["empty_hypotheses"]:
            lines.append(f"{name}: {result['empty_hypotheses']} of {count} hypotheses are empty")
    available = metrics["pairs"]
    count = min(pairs, len(available))
    for k in range(count):
        pair = available[(2 * k + 1) * len(available) // (2 * count)]
        lines += ["", pair["utterance"], f"  ref  {pair['reference']}", f"  hyp  {pair['hypothesis']}"]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Runs one evaluation; returns the exit status."""
    try:
        options = parse(Options, list(sys.argv[1:] if arguments is None else arguments), __doc__)
        positive("batch_seconds", options.batch_seconds)
        positive("num_workers", options.num_workers)
        known("precision", options.precision, PRECISIONS)
        path = existing_model(options.model)
        sets = read_sets(options.manifests, options.names)
    except UsageError as error:
        fail("evaluate.py", error, EXIT_USAGE)
    except ManifestError as error:
        fail("evaluate.py", error, EXIT_FAILED)
    set_threads()
    quiet_imports()
    from recipes.decode import ModelError, load_model

    output = Path(options.output).expanduser() if options.output else default_output(path, [one.name for one in sets])
    try:
        model = load_model(path, options.device)
        output.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written to is found before the work
        metrics = evaluate_model(
            model, sets, output=output, batch_seconds=options.batch_seconds, precision=options.precision,
            num_workers=options.num_workers, model_path=path,
        )
    except (ManifestError, ModelError, OSError) as error:
        fail("evaluate.py", error, EXIT_FAILED)
    print(report(metrics, options.pairs))
    print(f"\n{output / 'metrics.json'}")
    for result in metrics["manifests"]:
        print(result["predictions"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
