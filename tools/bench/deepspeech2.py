"""DeepSpeech2: a train step and its peak memory, ours against the same network with packed sequences.

    python -m tools.bench deepspeech2
    python -m tools.bench deepspeech2 --sizes small --manifest data/mini/train.json --corpus mini

Sizes: `small` and `full` of conf/size; `paper` is small with the paper's batch normalisation between the recurrent
layers instead of layer normalisation. The other side is written as DeepSpeech2 usually is (tools/bench/_packed.py).
Both step over the same padded batches in turns; outputs and gradients are compared first, in evaluation in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from manifests.report import table
from tools.bench._common import BenchError, guarded, save, set_up, step_parser

# Hydra overrides of each size, and seconds of audio in a batch.
SIZES = {
    "small": (["size=small"], 64.0),
    "paper": (["size=small", "model.encoder.rnn_norm=batch"], 64.0),
    "full": (["size=full"], 64.0),
}


def build_pair(settings: dict, seed: int = 0):
    """(ours, the packed one) with the same weights."""
    import torch

    from recipes.deepspeech2.encoder import DeepSpeech2Encoder
    from tools.bench._packed import PackedDeepSpeech2

    torch.manual_seed(seed)
    ours = DeepSpeech2Encoder(**settings)
    return ours, PackedDeepSpeech2(ours)


def run_case(settings: dict, batches: Sequence, labels: int, device, precision: str, warm: int = 1,
             spoil=None) -> dict:
    """One size: check, then turns; `spoil` changes our encoder before the check. Raises BenchError."""
    from tools.bench._packed import packed_state_dict
    from tools.bench._training import Side, check_equal, compare_steps

    ours, theirs = build_pair(settings)
    if spoil is not None:
        spoil(ours)

    def call_ours(features, lengths):
        return ours(audio_signal=features, length=lengths)

    both = [Side(encoder, call, ours._feat_out, labels, device, precision)
            for encoder, call in ((ours, call_ours), (theirs, theirs))]
    smallest = min(batches, key=lambda batch: batch.features.numel()).to(device)
    equal = check_equal(*both, smallest, grads_as_theirs=lambda grads: packed_state_dict(ours, grads))
    return {**compare_steps(*both, batches, warm), "equal": equal, "precision": precision, "settings": settings}


def main(argv: Sequence[str] | None = None) -> int:
    options = step_parser("deepspeech2", __doc__)
    options.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES), help="(default: all)")
    argv = list(sys.argv[1:] if argv is None else argv)
    args = options.parse_args(argv)
    if args.pairs < 1:
        options.error(f"--pairs {args.pairs}: at least 1")
    set_up()
    return guarded("deepspeech2", lambda: _run(args, argv))


def _run(args, argv) -> None:
    from omegaconf import OmegaConf

    from tools.bench._training import (
        HEAD, compose_recipe, feature_batches, manifest_or_noise, precision_of, remark, start, table_row
    )

    device, machine = start(args.device)
    precision = precision_of(args.precision, device)
    cases, rows = {}, []
    with manifest_or_noise(args.manifest) as manifest:
        for size in args.sizes:
            overrides, seconds = SIZES[size]
            cfg = compose_recipe("deepspeech2", args.corpus, manifest, *overrides)
            settings = OmegaConf.to_container(cfg.model.encoder, resolve=True)
            if settings.pop("_target_").rpartition(".")[2] != "DeepSpeech2Encoder":
                raise BenchError("the recipe's encoder is another one by now: this bench must follow")
            batches = feature_batches(cfg, args.batch_seconds or seconds, args.pairs)
            case = run_case(settings, batches, len(cfg.model.labels), device, precision, args.warm)
            cases[size] = case
            rows.append(table_row(size, case))
            print(f"{size}: {rows[-1][7]} times as fast as packed", file=sys.stderr, flush=True)
    save(args.json, "deepspeech2", __doc__, argv, machine, HEAD, rows, args.note, cases=cases,
         remarks=[remark(case["clock"])])
    print(table(HEAD, rows))


if __name__ == "__main__":
    sys.exit(main())
