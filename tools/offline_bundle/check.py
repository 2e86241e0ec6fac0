"""Does what was installed work? Every requirement, NeMo's import, and one forward and backward pass of a model.

    python -m tools.offline_bundle.check [--dir DIR] [--models conformer] [--device cpu]

Runs in the environment that `install` made. Each line says what was found; what is missing gets one line of its own.
"""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from tools.offline_bundle.node import EXIT_DOUBTS, installed_index, say
from tools.offline_bundle.parts import BundleError

SECONDS = 2.0  # of made-up audio in an utterance of the trial batch


class Requirements(NamedTuple):
    """How many packages are needed, a line for each that is missing or in a wrong version, and lines to know of."""

    count: int
    problems: list[str]
    notes: list[str]


def requirements_met(roots: list[str], left_out: list[str], own: Path) -> Requirements:
    """Walks the metadata of what is installed, from `roots`. Packages under `own` are the bundle's, others the node's.

    What the node's packages want of each other is the node's business and not looked at. Where one of them wants
    another version of what the bundle puts before its own, that is a note.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    def bundled(found) -> bool:
        return Path(found.locate_file("")).resolve().is_relative_to(own.resolve())

    out, seen, count = {canonicalize_name(name) for name in left_out}, set(), set()
    problems, notes = set(), set()
    waiting = [(Requirement(text), "the project", True) for text in roots]
    while waiting:
        requirement, wanted_by, ours = waiting.pop()
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras), str(requirement.specifier), ours)
        if name in out or key in seen:
            continue
        seen.add(key)
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            if ours:
                problems.add(f"{requirement} is missing, {wanted_by} needs it: pack again without it in --has")
            continue
        count.add(name)
        if not requirement.specifier.contains(found.version.partition("+")[0], prereleases=True):
            if ours:
                problems.add(f"{name} {found.version} is here, {wanted_by} needs {requirement}: give pack its version "
                             "too (--has with the output of `have`)")
            elif bundled(found):
                notes.add(f"{wanted_by} of the node wants {requirement}, the bundle's {found.version} stands first")
        for text in found.requires or []:
            needed = Requirement(text)
            extras = {"", *requirement.extras}
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append((needed, name, bundled(found)))
    return Requirements(len(count), sorted(problems), sorted(notes))


def one_pass(model_name: str, device: str | None = None) -> str:
    """Builds a small model of a recipe, runs one batch forward and back; returns a line. Raises BundleError."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        cfg = compose_for(model_name, Path(folder))
        from recipes.decode import pick_device
        from recipes.train import build_model

        where = pick_device(device or "auto")
        torch.manual_seed(0)
        cfg.model.train_ds = cfg.model.validation_ds = None  # the passes are on noise: no data is opened
        model = build_model(cfg).to(where).train()
        samples = int(SECONDS * cfg.model.sample_rate)
        audio_BT = 0.1 * torch.randn(2, samples, device=where)
        lengths = torch.tensor([samples, samples * 3 // 4], device=where)
        targets_BS = torch.randint(1, model.decoder.num_classes_with_blank - 1, (2, 8), device=where)
        begin = time.monotonic()
        precision = torch.bfloat16 if where.type == "cuda" else None
        with torch.autocast(where.type, dtype=precision, enabled=precision is not None):
            log_probs_BTV, encoded_lengths, _ = model(input_signal=audio_BT, input_signal_length=lengths)
        loss = torch.nn.functional.ctc_loss(
            log_probs_BTV.float().transpose(0, 1), targets_BS, encoded_lengths, torch.tensor([8, 6], device=where),
            blank=log_probs_BTV.shape[-1] - 1,
        )
        loss.backward()
        trained = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad]
        bad = [name for name, grad in trained if grad is None or not bool(torch.isfinite(grad).all())]
    if not bool(torch.isfinite(loss)):
        raise BundleError(f"{model_name}: the loss of one batch of noise is {float(loss)} on {where}")
    if bad:
        raise BundleError(f"{model_name}: no finite gradient in {bad[0]} and {len(bad) - 1} other tensors on {where}")
    parameters = sum(grad.numel() for _, grad in trained) / 1e6
    return (f"{model_name}: {parameters:.1f} M parameters, loss {float(loss):.2f}, finite gradients in {len(trained)} "
            f"tensors, on {where}, {time.monotonic() - begin:.1f} s")


def compose_for(model_name: str, folder: Path):
    """The recipe's small configuration, with manifests (and a tokenizer) made up in `folder`. Raises BundleError."""
    from manifests.schema import write_manifest
    from recipes.config import ConfigError, compose

    manifest = folder / "noise.json"
    text = "one two three four five six seven eight nine ten"
    write_manifest(manifest, [{"audio_filepath": "none.wav", "duration": SECONDS, "text": text}])
    overrides = ["trainer=cpu", f"corpus.train={manifest}", f"corpus.validation={manifest}"]
    if model_name.endswith("_bpe"):
        from manifests.tokenizer import train

        train([manifest], folder / "tokenizer", vocab=24)
        overrides.append(f"model.tokenizer.dir={folder / 'tokenizer'}")
    try:
        return compose(model_name, overrides)
    except ConfigError as error:
        raise BundleError(str(error)) from error


def nemo_line() -> str:
    """Imports NeMo's speech recognition, whose ImportError goes through."""
    from recipes.quiet import quiet_nemo

    begin = time.monotonic()
    nemo = importlib.import_module("nemo")
    importlib.import_module("nemo.collections.asr")
    quiet_nemo()
    return f"NeMo {nemo.__version__}: imported in {time.monotonic() - begin:.0f} s"


def audio_line(dest: Path, index: dict) -> str:
    """Reads one file of each corpus. Raises BundleError where the node's libsndfile cannot."""
    import soundfile

    from manifests.schema import iter_manifest, resolve_audio

    version = soundfile.__libsndfile_version__
    read = []
    for name in index["corpora"]:
        manifest = sorted((dest / "corpora" / name).glob("*.json"))[0]
        row = next(iter_manifest(manifest))[1]
        path = resolve_audio(row, manifest)
        try:
            samples, rate = soundfile.read(path)
        except (RuntimeError, OSError) as error:
            raise BundleError(f"{path}: libsndfile {version} cannot read it ({error}); Opus needs 1.1: pack with "
                              "--audio flac") from error
        if abs(len(samples) / rate - row["duration"]) > 0.01:
            raise BundleError(f"{path}: {len(samples) / rate:.3f} s, the manifest says {row['duration']}: pack again")
        read.append(f"{name} ({index['corpora'][name]['audio']})")
    return f"audio: libsndfile {version} reads {', '.join(read) or 'nothing, no corpus is here'}"


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, EXIT_DOUBTS where all works though packages are not as they should be, or 1 where it does not."""
    parser = argparse.ArgumentParser(prog="python -m tools.offline_bundle.check", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path.cwd().parent, help="folder that the bundle was unpacked to")
    parser.add_argument("--models", default="conformer", help="recipes to try, separated by commas (default conformer)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    args = parser.parse_args(arguments)
    from recipes.quiet import quiet_imports
    from recipes.threads import set_threads

    set_threads()
    quiet_imports()
    try:
        index = installed_index(args.dir)
        count, problems, notes = requirements_met(index["requires"], index["left_out"], Path(sys.prefix))
        for problem in problems:
            print(f"check: {problem}", file=sys.stderr)
        for note in notes:
            say(f"note: {note}")
        say(f"packages: {count} in use, {len(problems)} missing or in a wrong version")
        import torch

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        say(f"Python {platform.python_version()}, torch {torch.__version__}, {device}")
        say(nemo_line())
        say(audio_line(args.dir, index))
        for name in filter(None, args.models.split(",")):
            say(one_pass(name, args.device))
    except BundleError as error:
        print(f"check: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(f"check: {error} (module {error.name}): it is not on the node and not in the bundle", file=sys.stderr)
        return 1
    say("check: ready to train" if not problems else "check: works, but see the packages above")
    return EXIT_DOUBTS if problems else 0


if __name__ == "__main__":
    sys.exit(main())
