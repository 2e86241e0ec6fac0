"""A saved model with its weights in half precision, checked before it gets its name.

    python -m tools.offline_bundle.weights exp/conformer_mini/conformer.nemo OUT.nemo [--manifest dev.json]

Matrices and kernels are cut to float16. What that would harm stays float32: the features' filterbanks and windows,
running statistics, vectors (they weigh nothing), and any tensor with a value beyond 65,504, which would turn into
infinity and the model's outputs into NaN. NeMo opens the file as any other and computes in float32.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tarfile
from pathlib import Path

from tools.offline_bundle.node import say
from tools.offline_bundle.parts import BundleError, show_size

UTTERANCES = 100  # decoded with both


def halve(state: dict) -> tuple[dict, list[str]]:
    """(state dict with float16 where that is safe, names of matrices that stayed float32 for their range).

    Raises BundleError for weights that are not finite to begin with.
    """
    import torch

    halved, kept = {}, []
    for name, value in state.items():
        if not torch.is_floating_point(value):
            halved[name] = value
            continue
        if not bool(torch.isfinite(value).all()):
            raise BundleError(f"{name}: holds values that are not finite: the model is broken, nothing was written")
        small = value.ndim < 2 or name.startswith("preprocessor.") or "running_" in name
        if small:
            halved[name] = value
            continue
        half = value.to(torch.float16)
        if bool(torch.isfinite(half).all()):
            halved[name] = half
        else:
            halved[name] = value
            kept.append(name)
    return halved, kept


def write_half(source: Path, target: Path) -> dict:
    """Writes `target` from the .nemo `source`; returns its facts: bytes before and after, tensors kept in float32.

    Raises BundleError for a file that is no .nemo of weights.
    """
    import torch

    part = target.with_name(f".part-{target.name}")
    facts: dict = {"source_bytes": source.stat().st_size}
    try:
        with tarfile.open(source) as old, tarfile.open(part, "w") as new:
            found = False
            for member in old:
                data = old.extractfile(member)
                if data is None:
                    continue
                content = data.read()
                if member.name.endswith("model_weights.ckpt"):
                    found = True
                    state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
                    halved, facts["kept_float32"] = halve(state)
                    packed = io.BytesIO()
                    torch.save(halved, packed)
                    content = packed.getvalue()
                info = tarfile.TarInfo(member.name)
                info.size = len(content)
                new.addfile(info, io.BytesIO(content))
        if not found:
            raise BundleError(f"{source}: holds no model_weights.ckpt: is it a .nemo?")
    except (tarfile.TarError, OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"{source}: cannot be read as a .nemo: {str(error).splitlines()[0]}") from error
    os.replace(part, target)
    facts["bytes"] = target.stat().st_size
    return facts


def compare(source: Path, half: Path, manifest: Path, count: int = UTTERANCES) -> dict:
    """How transcripts of the manifest's first utterances differ between the two models.

    Returns utterances, how many transcripts differ, and both word error rates.
    """
    from recipes.data import read_rows
    from recipes.decode import Decoder, load_model
    from recipes.metrics import count_errors

    rows = read_rows(manifest)[:count]
    texts = [Decoder(load_model(path), rows).run() for path in (source, half)]
    references = [row["text"] for row in rows]
    rates = [count_errors(references, hypotheses)[0].rate for hypotheses in texts]
    differ = sum(a != b for a, b in zip(*texts))
    return {"utterances": len(rows), "differ": differ, "wer": rates[0], "wer_half": rates[1]}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.offline_bundle.weights", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the .nemo")
    parser.add_argument("target", type=Path, help="the .nemo to write; TARGET.json beside it says what was checked")
    parser.add_argument("--manifest", type=Path, help="decode its first utterances with both and compare")
    args = parser.parse_args(arguments)
    from recipes.quiet import quiet_imports
    from recipes.threads import set_threads

    set_threads()
    quiet_imports()
    checked = args.target.with_name(f".checked-{args.target.name}")
    try:
        facts = write_half(args.source, checked)
        if args.manifest:
            facts["compared"] = compare(args.source, checked, args.manifest)
    except BundleError as error:
        print(f"weights: {error}", file=sys.stderr)
        return 1
    args.target.with_name(args.target.name + ".json").write_text(json.dumps(facts, indent=1) + "\n")
    os.replace(checked, args.target)
    line = f"{args.target}: {show_size(facts['source_bytes'])} to {show_size(facts['bytes'])}"
    if facts["kept_float32"]:
        line += f", {len(facts['kept_float32'])} matrices kept in float32 for their range"
    if args.manifest:
        both = facts["compared"]
        line += (f"; of {both['utterances']} transcripts {both['differ']} differ, WER {both['wer']:.2%} and "
                 f"{both['wer_half']:.2%}")
    say(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
