"""Loader: hours of audio a second from FLAC, from shards and from the cache; what the model eats; padding waste.

    python -m tools.bench loader --manifest data/mini/train.json --corpus mini --recipe deepspeech2
    python -m tools.bench loader --padding mini=data/mini/train.json librispeech_8h=data/librispeech_8h/train.json

The recipe's own training loader, in this process without workers: each further worker adds the same again while there
are cores. `cache` is a later epoch of `cache_features`; `FLAC and features` is what the cache replaces. The train step
is the recipe's network on the same batches, from features. All take turns over the same epochs. Padding waste is the
share of padded frames in the batches of a whole epoch, and takes durations only: the audio need not be there.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from manifests.report import table
from tools.bench._common import BenchError, fair_clock, guarded, parser, ratios, save, set_up, shown, spread, take_turns

GOAL_WASTE, GOAL_SURPLUS = 0.03, 1.5
MODEL = "train step"


def padding_waste(cfg, batch_seconds: float | None = None) -> dict[str, float]:
    """Share of padding in the batches of an epoch by the recipe's buckets; how many batches, and their mean seconds."""
    from tools.bench._training import train_loader

    loader = train_loader(cfg, batch_seconds or cfg.training.global_batch_seconds)
    real = padded = 0.0
    batches = 0
    for cuts in loader.sampler:
        durations = [cut.duration for cut in cuts]
        real += sum(durations)
        padded += max(durations) * len(durations)
        batches += 1
    if not batches:
        raise BenchError("no batch: the manifest's utterances are out of the recipe's range")
    return {"waste": 1 - real / padded, "batches": batches, "seconds_a_batch": real / batches, "hours": real / 3600}


def shards_of(manifest: Path, folder: Path) -> Path:
    """The manifest as shards, for the same loader."""
    from manifests.shards import COMBINED, write_shards

    write_shards([manifest], folder, hours=0.25)
    return folder / COMBINED


def sources(recipe: str, corpus: str, manifest: Path, batch_seconds: float, scratch: Path,
            overrides: Sequence[str] = ()) -> dict[str, Callable[[int], float]]:
    """Name to function: one epoch of the loader; returns the seconds of audio it gave."""
    from tools.bench._training import compose_recipe, make_preprocessor, train_loader

    def epochs(path: Path, cache: bool = False, features: bool = False) -> Callable[[int], float]:
        cfg = compose_recipe(recipe, corpus, path, *overrides)
        preprocessor = make_preprocessor(cfg)
        loader = train_loader(cfg, batch_seconds, cache, preprocessor)
        rate = 1 / cfg.model.preprocessor.window_stride if cache else cfg.model.sample_rate

        def epoch(_: int) -> float:
            seconds = 0.0
            for signals, lengths, *_ in loader:
                seconds += float(lengths.sum()) / rate
                if features:
                    preprocessor(input_signal=signals, length=lengths)
            return seconds

        return epoch

    return {
        "FLAC": epochs(manifest), "FLAC and features": epochs(manifest, features=True),
        "shards": epochs(shards_of(manifest, scratch / "shards")), "cache": epochs(manifest, cache=True),
    }


def model_eats(recipe: str, corpus: str, manifest: Path, batch_seconds: float, device, precision: str,
               overrides: Sequence[str] = (), steps: int = 4) -> tuple[Callable[[int], float], int]:
    """(`steps` train steps of the recipe's network on its own batches, giving their seconds of audio; parameters)."""
    from tools.bench._training import compose_recipe, feature_batches, recipe_side

    cfg = compose_recipe(recipe, corpus, manifest, *overrides)
    side = recipe_side(cfg, device, precision)
    batches = [batch.to(device) for batch in feature_batches(cfg, batch_seconds, steps)]

    def eat(_: int) -> float:
        for batch in batches:
            side.step(batch)
        return sum(batch.seconds for batch in batches)

    return eat, sum(parameter.numel() for parameter in side.parameters())


def run_case(recipe: str, corpus: str, manifest: Path, batch_seconds: float, device, precision: str, rounds: int,
             scratch: Path, overrides: Sequence[str] = ()) -> dict:
    """Turns of all sources and of the model: hours of audio a second of each, and how often that is what it eats."""
    import torch

    eat, parameters = model_eats(recipe, corpus, manifest, batch_seconds, device, precision, overrides)
    ways = {**sources(recipe, corpus, manifest, batch_seconds, scratch, overrides), MODEL: eat}
    given: dict[str, float] = {}

    def counted(name: str) -> Callable[[int], None]:
        def call(number: int) -> None:
            given[name] = ways[name](number)

        return call

    synchronise = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    costs = take_turns({name: counted(name) for name in ways}, rounds, 1, synchronise)
    clock = fair_clock(device.type, torch.get_num_threads())
    # a second of audio by the model against one by the loader
    per_second = {
        name: [type(cost)(*(part / given[name] for part in cost)) for cost in runs] for name, runs in costs.items()
    }
    return {
        "recipe": recipe, "corpus": corpus, "clock": clock, "batch_seconds": batch_seconds, "precision": precision,
        "parameters": parameters,
        "audio_seconds": given,
        "hours_a_second": {
            name: spread([1 / getattr(cost, clock) / 3600 for cost in runs]) for name, runs in per_second.items()
        },
        "times_what_the_model_eats": {
            name: ratios(per_second[MODEL], runs) for name, runs in per_second.items() if name != MODEL
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    options = parser("loader", __doc__)
    options.add_argument("--manifest", type=Path, help="speech to load; without it noise of 2 to 16 s")
    options.add_argument("--corpus", default="librispeech_8h", help="whose buckets and batch (default %(default)s)")
    options.add_argument("--recipe", default="deepspeech2", help="whose network eats (default %(default)s)")
    options.add_argument("--batch-seconds", type=float, help="seconds of audio in a batch (default: the corpus')")
    options.add_argument("--rounds", type=int, default=5, help="epochs of each that count (default %(default)s)")
    options.add_argument("--padding", nargs="*", default=[], metavar="CORPUS=MANIFEST", help="padding waste of these")
    options.add_argument("--precision", default="auto", choices=("auto", "32", "bf16-mixed"))
    options.add_argument("--device", default="auto", help="of the network: auto, cpu, cuda or cuda:N")
    options.add_argument("--override", nargs="*", default=[], help="Hydra overrides of the recipe")
    argv = list(sys.argv[1:] if argv is None else argv)
    args = options.parse_args(argv)
    set_up()
    return guarded("loader", lambda: _run(args, argv))


def _run(args, argv) -> None:
    from tools.bench._training import compose_recipe, manifest_or_noise, precision_of, start

    device, machine = start(args.device)
    waste = {}
    with manifest_or_noise(args.manifest) as manifest, tempfile.TemporaryDirectory() as scratch:
        asked = [("", args.corpus, manifest)] if not args.padding else []
        for pair in args.padding:
            corpus, equals, path = pair.partition("=")
            if not equals:
                raise BenchError(f"--padding {pair}: give CORPUS=MANIFEST")
            asked.append((corpus, corpus, Path(path)))
        for name, corpus, path in asked:
            cfg = compose_recipe(args.recipe, corpus, path.resolve(), *args.override)
            waste[name or corpus] = {"manifest": path.name, **padding_waste(cfg)}
        cfg = compose_recipe(args.recipe, args.corpus, manifest, *args.override)
        case = run_case(args.recipe, args.corpus, manifest, args.batch_seconds or cfg.training.global_batch_seconds,
                        device, precision_of(args.precision, device), args.rounds, Path(scratch), args.override)
    clock = case["clock"]
    head = ["", "hours of audio a second (quartiles)", "times what the model eats (quartiles)", "goal"]
    body = []
    for name, rate in case["hours_a_second"].items():
        label, surplus = name, case["times_what_the_model_eats"].get(name, {}).get(clock)
        if name == MODEL:
            label = f"{args.recipe}, {case['parameters'] / 1e6:.1f} M, a train step, {case['precision']}"
        quartiles = f"{rate['median']:.4g} ({rate['q1']:.4g} to {rate['q3']:.4g})"
        body.append([label, quartiles, shown(surplus) if surplus else "", f"{GOAL_SURPLUS:g}" if surplus else ""])
    remarks = [f"{'CPU time of this process' if clock == 'cpu' else 'By the clock'}, without workers, batches of "
               f"{case['batch_seconds']:g} s, {args.rounds} rounds."]
    for corpus, found in waste.items():
        remarks.append(f"Padding waste with the buckets of {corpus} on {found['manifest']} ({found['hours']:.2f} h, "
                       f"{found['batches']} batches of {found['seconds_a_batch']:.0f} s): "
                       f"{100 * found['waste']:.2f} %, goal under {100 * GOAL_WASTE:g} %.")
    save(args.json, "loader", __doc__, argv, machine, head, body, args.note, case=case, padding=waste, remarks=remarks)
    print("\n".join([table(head, body), *remarks]))


if __name__ == "__main__":
    sys.exit(main())
