"""Evaluation: hypotheses of a test set, our decoder against NeMo's transcribe() with the same weights.

    python -m tools.bench evaluate --manifest data/mini/dev.json --model exp/conformer_mini/conformer.nemo
    python -m tools.bench evaluate

Both sides go from the files of a manifest to texts in its order, in turns. Where the model has our Conformer encoder,
NeMo's side is NeMo's own model with NeMo's ConformerEncoder and the same weights; any other model is the same object
on both sides. transcribe() is measured at several batch sizes, 4 being its default. Without --model the conformer
recipe with random weights. Texts are compared first: they must agree in 99 of 100 utterances.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from manifests.report import table
from tools.bench._common import BenchError, fair_clock, guarded, parser, ratios, save, set_up, shown, spread, take_turns

AGREE = 0.99
OURS = "ours"


def stock_twin(model):
    """NeMo's EncDecCTCModel (or BPE) with NeMo's encoder and the weights of `model`, which has our Conformer.

    Returns `model` itself where its encoder is none of ours to rebuild.
    """
    import torch
    from nemo.collections.asr.models import EncDecCTCModel
    from nemo.collections.asr.modules.conformer_encoder import ConformerEncoder as NemoConformerEncoder
    from omegaconf import OmegaConf

    from recipes.conformer.encoder import ConformerEncoder
    from recipes.conformer.nemo_weights import to_nemo_state_dict
    from tools.bench.conformer import settings_of

    if not isinstance(model.encoder, ConformerEncoder) or model.cfg.get("tokenizer"):
        return model
    cfg = OmegaConf.create(OmegaConf.to_container(model.cfg, resolve=True))
    settings = settings_of("small", OmegaConf.to_container(model.cfg.encoder, resolve=True))
    target = f"{NemoConformerEncoder.__module__}.{NemoConformerEncoder.__name__}"
    cfg.encoder = {"_target_": target, "feat_in": model.cfg.encoder.feat_in, **settings}
    for key in ("target", "train_ds", "validation_ds", "test_ds", "optim", "ctc_reduction"):
        cfg.pop(key, None)
    device = next(model.parameters()).device
    twin = EncDecCTCModel(cfg).to(device).eval()
    with torch.no_grad():
        twin.encoder.load_state_dict(to_nemo_state_dict(model.encoder.state_dict()))
        twin.decoder.load_state_dict(model.decoder.state_dict())
        twin.preprocessor.load_state_dict(model.preprocessor.state_dict())
    return twin


def random_model(cfg):
    """The recipe's model with random weights, spread so that letters, spaces and blanks all occur."""
    import torch
    from omegaconf import open_dict

    from recipes.ctc_model import CTCModel

    torch.manual_seed(0)
    with open_dict(cfg):
        for key in ("train_ds", "validation_ds", "optim"):
            cfg.model.pop(key, None)
    model = CTCModel(cfg=cfg.model).eval()
    with torch.no_grad():
        model.decoder.decoder_layers[0].weight.mul_(4.0)
    return model


def texts_of(hypotheses) -> list[str]:
    """The texts of what transcribe() returns."""
    return [one if isinstance(one, str) else one.text for one in hypotheses]


def run_case(model, twin, rows: list[dict], batch_sizes: Sequence[int], rounds: int, warm: int = 0) -> dict:
    """Check, then turns of our decoder and transcribe() at each batch size. Raises BenchError."""
    import torch

    from recipes.decode import Decoder

    paths = [row["audio_filepath"] for row in rows]
    found: dict[str, list[str]] = {}

    def ours(_):
        found[OURS] = Decoder(model, rows).run()

    def transcribe(size: int):
        def call(_):
            found[str(size)] = texts_of(twin.transcribe(paths, batch_size=size, num_workers=0, verbose=False))

        return call

    ways = {OURS: ours, **{str(size): transcribe(size) for size in batch_sizes}}
    ours(0)
    transcribe(batch_sizes[0])(0)
    agree = agreement(found[OURS], found[str(batch_sizes[0])])
    device = next(model.parameters()).device
    synchronise = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    costs = take_turns(ways, rounds, warm, synchronise)
    audio = sum(row["duration"] for row in rows)
    clock = fair_clock(device.type, torch.get_num_threads())
    return {
        "clock": clock,
        "utterances": len(rows),
        "audio_seconds": audio,
        "agree": agree,
        "same_object": model is twin,
        "model_class": type(model).__name__,
        "encoder": type(model.encoder).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "ratio": {name: ratios(costs[name], costs[OURS]) for name in ways if name != OURS},
        "seconds": {
            name: {kind: spread([getattr(cost, kind) for cost in runs]) for kind in ("wall", "cpu")}
            for name, runs in costs.items()
        },
    }


def agreement(a: Sequence[str], b: Sequence[str]) -> float:
    """Share of equal texts. Raises BenchError under AGREE, or where all are empty and nothing is compared."""
    share = sum(x.split() == y.split() for x, y in zip(a, b, strict=True)) / len(a)
    if share < AGREE:
        k = next(i for i, (x, y) in enumerate(zip(a, b)) if x.split() != y.split())
        raise BenchError(
            f"only {100 * share:.1f} % of the texts agree, not {100 * AGREE:g}: the first is {a[k][:40]!r}, theirs "
            f"{b[k][:40]!r}; nothing was measured"
        )
    if not any(text.strip() for text in a):
        raise BenchError("all texts are empty, so that equal ones say nothing: give a trained --model")
    return share


def main(argv: Sequence[str] | None = None) -> int:
    options = parser("evaluate", __doc__)
    options.add_argument("--model", type=Path, help=".nemo; without it the conformer recipe with random weights")
    options.add_argument("--manifest", type=Path, help="the test set; without it noise of 2 to 16 s")
    options.add_argument("--utterances", type=int, help="only the first N of the manifest")
    options.add_argument("--batch-sizes", type=int, nargs="+", default=[4, 16, 32], help="of transcribe()")
    options.add_argument("--rounds", type=int, default=5, help="runs of each that count (default %(default)s)")
    options.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    options.add_argument("--override", nargs="*", default=[], help="of the recipe, where no --model is given")
    argv = list(sys.argv[1:] if argv is None else argv)
    args = options.parse_args(argv)
    set_up()
    return guarded("evaluate", lambda: _run(args, argv))


def _run(args, argv) -> None:
    from recipes.data import read_rows
    from recipes.decode import ModelError, load_model
    from tools.bench._training import compose_recipe, manifest_or_noise, start

    device, machine = start(args.device)
    with manifest_or_noise(args.manifest) as manifest:
        rows = read_rows(manifest)[: args.utterances]
        try:
            model = (load_model(args.model, device) if args.model else
                     random_model(compose_recipe("conformer", "mini", manifest, *args.override)).to(device))
        except ModelError as error:
            raise BenchError(str(error)) from None
        case = run_case(model, stock_twin(model), rows, args.batch_sizes, args.rounds)
    clock, seconds = case["clock"], case["seconds"]
    head = ["", "utterances", "minutes", "seconds", "times real time", "ours is faster by (quartiles)", "rounds"]
    body = [
        [
            "ours" if name == OURS else f"transcribe(batch_size={name})",
            str(case["utterances"]), f"{case['audio_seconds'] / 60:.1f}", f"{figures[clock]['median']:.2f}",
            f"{case['audio_seconds'] / figures[clock]['median']:.0f}",
            "" if name == OURS else shown(case["ratio"][name][clock]), str(args.rounds),
        ]
        for name, figures in seconds.items()
    ]
    other = "the same model object" if case["same_object"] else "NeMo's model with NeMo's encoder, the same weights"
    save(args.json, "evaluate", __doc__, argv, machine, head, body, args.note, case=case, remarks=[
        f"{case['encoder']}, {case['parameters'] / 1e6:.1f} M parameters; transcribe() on {other}; "
        f"{100 * case['agree']:.1f} % of the texts are equal; medians, "
        f"{'CPU time' if clock == 'cpu' else 'by the clock'}."
    ])
    print(table(head, body))


if __name__ == "__main__":
    sys.exit(main())
