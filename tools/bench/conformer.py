"""Conformer: a train step and its peak memory, ours against NeMo's ConformerEncoder with the same weights.

    python -m tools.bench conformer
    python -m tools.bench conformer --sizes small S --manifest train.json --corpus librispeech_8h --precision 32
    python -m tools.bench conformer --compile --sizes small --device cuda

Sizes: `small` is the recipe's for a CPU, `S` and `L` are those of NeMo's published Conformer-CTC with all of its
settings. Both sides have the same dropout, precision, head, loss and optimizer, and step over the same padded batches
in turns. Outputs and gradients are compared first, without dropout in float32.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence

from manifests.report import table
from tools.bench._common import BenchError, guarded, save, set_up, step_parser

# conformer_ctc_bpe.yaml of NeMo: what all its sizes share, and those of the two.
NEMO = {
    "subsampling": "striding", "subsampling_factor": 4, "subsampling_conv_channels": -1, "ff_expansion_factor": 4,
    "xscaling": True, "untie_biases": True, "conv_kernel_size": 31, "conv_norm_type": "batch_norm", "dropout": 0.1,
    "dropout_pre_encoder": 0.1, "dropout_emb": 0.0, "dropout_att": 0.1,
}
SIZES = {"S": {"n_layers": 16, "d_model": 176, "n_heads": 4}, "L": {"n_layers": 18, "d_model": 512, "n_heads": 8}}
# Seconds of audio in a batch: small as the mini recipe has it, the others so that a CPU ends.
BATCH_SECONDS = {"small": 64.0, "S": 64.0, "L": 64.0}


def settings_of(size: str, recipe_encoder: dict | None = None) -> dict:
    """Arguments of both encoders but `feat_in`. Raises BenchError for an unknown size."""
    from recipes.conformer.encoder import ConformerEncoder

    if size in SIZES:
        return {**NEMO, **SIZES[size]}
    if size != "small" or recipe_encoder is None:
        raise BenchError(f"--sizes {size}: use small, {', '.join(SIZES)}")
    # what the recipe leaves to our defaults must be said to NeMo, whose defaults are others
    parameters = inspect.signature(ConformerEncoder.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty and p.name != "feat_out"}
    return {**defaults, **{k: v for k, v in recipe_encoder.items() if k not in ("_target_", "feat_in")}}


def build_pair(settings: dict, feat_in: int, seed: int = 0):
    """(ours, NeMo's) encoders with the same weights."""
    import torch
    from nemo.collections.asr.modules.conformer_encoder import ConformerEncoder as NemoConformerEncoder

    from recipes.conformer.encoder import ConformerEncoder
    from recipes.conformer.nemo_weights import conformer_args_from_nemo, to_nemo_state_dict

    torch.manual_seed(seed)
    settings = {"feat_in": feat_in, **settings}
    ours = ConformerEncoder(**conformer_args_from_nemo(settings))
    theirs = NemoConformerEncoder(**settings)
    theirs.load_state_dict(to_nemo_state_dict(ours.state_dict()))
    return ours, theirs


def sides(ours, theirs, labels: int, device, precision: str, compiled: bool = False):
    """The two as sides of a comparison of train steps; compiled both as wholes, with changing shapes."""
    import torch

    from tools.bench._training import Side

    def call_ours(features, lengths):
        return ours.encode(features, lengths)[:2]

    def call_theirs(features, lengths):
        return theirs(audio_signal=features, length=lengths)

    calls = [call_ours, call_theirs]
    if compiled:
        calls = [torch.compile(call, dynamic=True) for call in calls]
    return [
        Side(encoder, call, encoder.d_model, labels, device, precision)
        for encoder, call in zip((ours, theirs), calls)
    ]


def run_case(settings: dict, batches: Sequence, feat_in: int, labels: int, device, precision: str,
             compiled: bool = False, warm: int = 1, spoil=None) -> dict:
    """One size: check, then turns; `spoil` changes our encoder before the check. Raises BenchError."""
    from recipes.conformer.nemo_weights import to_nemo_state_dict
    from tools.bench._training import check_equal, compare_steps

    ours, theirs = build_pair(settings, feat_in)
    if spoil is not None:
        spoil(ours)
    # eager, as compiled code is the same network; on the smallest batch, with padding in it
    smallest = min(batches, key=lambda batch: batch.features.numel()).to(device)
    eager = sides(ours, theirs, labels, device, precision)
    equal = check_equal(*eager, smallest, grads_as_theirs=to_nemo_state_dict)
    case = compare_steps(*(sides(ours, theirs, labels, device, precision, True) if compiled else eager), batches, warm)
    return {**case, "equal": equal, "precision": precision, "compiled": compiled, "settings": settings}


def main(argv: Sequence[str] | None = None) -> int:
    options = step_parser("conformer", __doc__)
    options.add_argument("--sizes", nargs="+", default=["small", "S", "L"], help="small, S, L (default: all)")
    options.add_argument("--compile", action="store_true", help="both sides by torch.compile")
    options.add_argument("--nemo-sdpa", action="store_true", help="NeMo's side with use_pytorch_sdpa=true")
    argv = list(sys.argv[1:] if argv is None else argv)
    args = options.parse_args(argv)
    set_up()
    return guarded("conformer", lambda: _run(args, argv))


def _run(args, argv) -> None:
    from omegaconf import OmegaConf

    from tools.bench._training import (
        HEAD, compose_recipe, feature_batches, manifest_or_noise, precision_of, remark, start, table_row
    )

    device, machine = start(args.device)
    precision = precision_of(args.precision, device)
    cases, rows = {}, []
    with manifest_or_noise(args.manifest) as manifest:
        cfg = compose_recipe("conformer", args.corpus, manifest)
        for size in args.sizes:
            settings = settings_of(size, OmegaConf.to_container(cfg.model.encoder, resolve=True))
            if args.nemo_sdpa:
                settings["use_pytorch_sdpa"] = True
            batches = feature_batches(cfg, args.batch_seconds or BATCH_SECONDS[size], args.pairs)
            case = run_case(settings, batches, cfg.model.preprocessor.features, len(cfg.model.labels), device,
                            precision, args.compile, args.warm)
            cases[size] = case
            rows.append(table_row(f"{size}, {'compiled' if args.compile else 'eager'}", case))
            print(f"{size}: {rows[-1][7]} times as fast as NeMo's", file=sys.stderr, flush=True)
    save(args.json, "conformer", __doc__, argv, machine, HEAD, rows, args.note, cases=cases,
         remarks=[remark(case["clock"])])
    print(table(HEAD, rows))


if __name__ == "__main__":
    sys.exit(main())
