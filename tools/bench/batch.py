"""Batch: the seconds of audio that a batch of a recipe can hold on a device, the worst bucket tried first.

    python -m tools.bench batch --recipe conformer --corpus librispeech_960h --device cuda --override size=full
    python -m tools.bench batch --recipe deepspeech2 --corpus mini --device cpu --limit-gib 4

Whole train steps of the recipe's own model (network, CTC, backward, clipping, optimizer) on noise of a bucket's full
length at the slowest tempo that the recipe may draw, with targets as dense as the corpus has them: the memory of a
batch depends on shapes alone. The bucket of the longest utterances is searched first, by doubling and bisection; the
others are then tried at what it gave, and searched where that is too much. The least of all is what
`training.global_batch_seconds` may be on one device. On a GPU a batch is too large where CUDA has no memory left of
--share; on a CPU where the process' peak passes --limit-gib, which is approached from below, each next step by what the
last ones took. Characters and sentencepiece tokens alike.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from manifests.report import table
from tools.bench._common import BenchError, guarded, parser, reset_peak, rss, save, set_up

DENSITY = 25.0  # characters a second where no manifest says more: LibriSpeech's densest utterances
SETTLED = 0.05  # bisection ends when the two bounds are this near
MOST = 1 << 14  # utterances: nobody's batch is larger


class Probe(NamedTuple):
    """One try: utterances of one bucket, whether they fitted, and the peak in bytes (None where it did not fit)."""

    bucket: float
    utterances: int
    fits: bool
    peak: int | None

    @property
    def seconds(self) -> float:
        return self.bucket * self.utterances


def largest(fits: Callable[[int], Probe], start: int = 1, limit: int | None = None) -> tuple[int, list[Probe]]:
    """The most utterances that fit, to `SETTLED`, and all probes. 0 where not even one does.

    `limit` in bytes: the next try is never more than what the last two peaks say would reach it.
    """
    probes: list[Probe] = []
    low, high, count = 0, MOST + 1, max(start, 1)
    while True:
        probe = fits(count)
        probes.append(probe)
        if probe.fits:
            low = max(low, count)
        else:
            high = min(high, count)
        if high - low <= max(1, round(SETTLED * low)) or low == MOST:
            return low, probes
        if high <= MOST:
            count = (low + high) // 2
        else:
            count = min(2 * low, MOST, max(foreseen(probes, limit), low + 1))


def foreseen(probes: Sequence[Probe], limit: int | None) -> int:
    """Utterances at which a line through the last two peaks reaches the limit; MOST where there is no line."""
    known = sorted({(probe.utterances, probe.peak) for probe in probes if probe.fits and probe.peak is not None})
    if limit is None or len(known) < 2:
        return MOST
    (n1, p1), (n2, p2) = known[-2:]
    return MOST if p2 <= p1 else int(n2 + (limit - p2) * (n2 - n1) / (p2 - p1))


def search(buckets: Sequence[float], probe: Callable[[float, int], Probe], limit: int | None = None) -> dict:
    """Seconds a batch can hold over all buckets (upper ends in seconds), and what was tried.

    Raises BenchError where a single utterance of some bucket does not fit.
    """
    tried: list[Probe] = []
    found: dict[float, int] = {}
    seconds = float("inf")
    for bucket in sorted(buckets, reverse=True):
        count = 0
        if found:  # what the worse buckets gave, first: mostly it fits, and there is nothing to search
            count = int(seconds / bucket)
            first = probe(bucket, max(count, 1))
            tried.append(first)
            if first.fits:
                found[bucket] = max(count, 1)
                continue
        count, probes = largest(lambda n: probe(bucket, n), max(count // 2, 1), limit)
        tried += probes
        if count == 0:
            raise BenchError(f"one utterance of {bucket:g} s does not fit: a smaller model, or a lower max_duration")
        found[bucket] = count
        seconds = min(seconds, bucket * count)
    return {"seconds": seconds, "utterances": found, "probes": tried}


# ---- the train step ----------------------------------------------------------------------------------------------


def make_step(cfg, device, precision: str, density: float) -> Callable[[float, int], None]:
    """Function (bucket in seconds, utterances): one train step of the recipe, after a short one that has been made.

    The step is the recipe's model's own `training_step` with all that the recipe asks for (masks, intermediate CTC, two
    views), on features where the recipe keeps them and on audio elsewhere, always at the slowest tempo it may draw.
    """
    import torch
    from nemo.core.classes.mixins import AccessMixin
    from omegaconf import OmegaConf

    from recipes.train import build_model

    cfg = copy.deepcopy(cfg)
    train, clip, rate = cfg.model.train_ds, cfg.trainer.gradient_clip_val, cfg.model.sample_rate
    cached, longest = bool(train.get("cache_features")), float(train.max_duration)
    cfg.model.train_ds = cfg.model.validation_ds = None  # it steps over noise: no data is opened
    torch.manual_seed(0)
    model = build_model(cfg).to(device).train()
    model.log = model.log_dict = lambda *args, **kwargs: None  # there is no trainer
    model._alike = SimpleNamespace(uniform=lambda low, high: high)
    optim = OmegaConf.to_container(cfg.model.optim, resolve=True) | {"lr": 1e-9}  # no step shall spoil the next one
    optim.pop("sched", None)
    optimizer, _ = model.setup_optimization(OmegaConf.create(optim))
    encode, letters = model.training_text_encoder(), [label for label in cfg.model.labels if label.strip()]

    def step(bucket: float, utterances: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        AccessMixin.reset_registry(model)  # a step that found no memory has left its layers' outputs there
        generator = torch.Generator().manual_seed(0)
        signals = torch.randn(1, round(bucket * rate), generator=generator).mul_(0.1).to(device)
        lengths = torch.tensor([signals.shape[1]], device=device)
        if cached:
            with torch.no_grad():
                signals, lengths = model.preprocessor(input_signal=signals, length=lengths)
            signals = signals[:, :, : int(lengths)]
        text = torch.randint(len(letters), (max(round(bucket * density), 1),), generator=generator)
        tokens = torch.tensor(encode("".join(letters[i] for i in text.tolist())), dtype=torch.long, device=device)
        sizes = torch.full((utterances,), len(tokens), device=device)
        # All alike: what a step takes depends on shapes alone.
        signals = signals.expand(utterances, *signals.shape[1:]).clone()
        batch = signals, lengths.repeat(utterances), tokens.repeat(utterances, 1), sizes, ["noise"] * utterances
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = model.training_step(batch, 0)["loss"]
        loss.backward()
        model.on_before_optimizer_step(optimizer)
        model.configure_gradient_clipping(optimizer, clip)
        optimizer.step()

    step(min(2.0, longest), 1)  # the state of the optimizer
    return step


def cuda_probe(step: Callable[[float, int], None], device) -> Callable[[float, int], Probe]:
    """Probes in this process: CUDA says where memory ends, and takes all back."""
    import torch

    def probe(bucket: float, utterances: int) -> Probe:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        fits = True
        try:
            step(bucket, utterances)
            torch.cuda.synchronize(device)
        except torch.cuda.OutOfMemoryError:
            fits = False
        return Probe(bucket, utterances, fits, torch.cuda.max_memory_reserved(device) if fits else None)

    return probe


def cpu_probe(make: Callable[[], Callable[[float, int], None]], limit: int) -> Callable[[float, int], Probe]:
    """Probes in a process each, forked from this one, which has not computed anything: what a process has freed it
    does not wholly give back, and kernels made for a shape stay, so that a second probe would count the first one's.

    The forked process computes in one thread: those of its parent it has not.
    """

    def probe(bucket: float, utterances: int) -> Probe:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:  # pragma: no cover  (another process)
            status = 1
            try:
                import torch

                os.close(reader)
                torch.set_num_threads(1)
                step = make()
                if reset_peak():
                    step(bucket, utterances)
                    os.write(writer, str(rss("VmHWM")).encode())
                    status = 0
            except BaseException as error:  # nothing may unwind into the parent's code
                print(f"bench batch: {error}", file=sys.stderr, flush=True)
            finally:
                os._exit(status)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            told = pipe.read()
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):  # the system's own end of memory
            return Probe(bucket, utterances, False, None)
        if not told.isdigit():
            raise BenchError(f"{utterances} x {bucket:g} s ended without a figure: Linux with /proc is needed")
        return Probe(bucket, utterances, int(told) <= limit, int(told))

    return probe


def aloud(probe: Callable[[float, int], Probe]) -> Callable[[float, int], Probe]:
    """The same, with a line on stderr for each."""

    def told(bucket: float, utterances: int) -> Probe:
        result = probe(bucket, utterances)
        peak = f", {result.peak / 2**30:.2f} GiB" if result.peak is not None else ""
        print(f"{utterances} x {bucket:g} s = {result.seconds:.0f} s: {'fits' if result.fits else 'too much'}{peak}",
              file=sys.stderr, flush=True)
        return result

    return told


def check_tokenizer(cfg) -> None:
    """Raises BenchError where the recipe's tokenizer is not there."""
    tokenizer = cfg.model.get("tokenizer")
    if tokenizer and not (Path(tokenizer.dir) / "tokenizer.model").is_file():
        raise BenchError(f"model.tokenizer.dir={tokenizer.dir}: no tokenizer.model: run python -m manifests.tokenizer")


def densest(manifest: Path | None) -> float:
    """Characters a second of the densest utterance over a second long; DENSITY without a manifest."""
    from manifests.schema import read_manifest

    if manifest is None:
        return DENSITY
    rates = [len(row["text"]) / row["duration"] for row in read_manifest(manifest) if row["duration"] >= 1.0]
    return max(rates, default=DENSITY)


def buckets_of(cfg) -> list[float]:
    """Upper ends of the recipe's duration buckets in seconds, the last one the longest utterance."""
    ends = [float(end) for end in cfg.model.train_ds.bucket_duration_bins]
    longest = float(cfg.model.train_ds.max_duration)
    return sorted({end for end in ends if end < longest} | {longest})


def main(argv: Sequence[str] | None = None) -> int:
    options = parser("batch", __doc__)
    options.add_argument("--recipe", default="conformer", help="(default %(default)s)")
    options.add_argument("--corpus", default="librispeech_960h", help="whose buckets (default %(default)s)")
    options.add_argument("--manifest", type=Path, help="its densest text is what targets are made like")
    options.add_argument("--limit-gib", type=float, help="memory of the process on a CPU (default: half of the free)")
    options.add_argument("--share", type=float, default=0.9, help="of a GPU's memory (default %(default)s)")
    options.add_argument("--precision", default="auto", choices=("auto", "32", "bf16-mixed"))
    options.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    options.add_argument("--override", nargs="*", default=[], help="Hydra overrides of the recipe")
    argv = list(sys.argv[1:] if argv is None else argv)
    args = options.parse_args(argv)
    if not 0 < args.share <= 1 or (args.limit_gib is not None and args.limit_gib <= 0):
        options.error("--share is over 0 up to 1, --limit-gib over 0")
    set_up()
    return guarded("batch", lambda: _run(args, argv))


def _run(args, argv) -> None:
    import torch

    import recipes.ctc_model  # noqa: F401  NeMo with it: else each probe on a CPU would import it anew
    from tools.bench._training import compose_recipe, manifest_or_noise, precision_of, start

    device, machine = start(args.device)
    precision = precision_of(args.precision, device)
    density = densest(args.manifest)
    with manifest_or_noise(None, 1) as any_manifest:  # no audio of the corpus is needed
        cfg = compose_recipe(args.recipe, args.corpus, any_manifest, *args.override)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_per_process_memory_fraction(args.share, device)
        limit, total = None, torch.cuda.get_device_properties(device).total_memory * args.share
    else:
        limit = total = int((args.limit_gib or _free_gib() / 2) * 2**30)

    def make():
        return make_step(cfg, device, precision, density)

    check_tokenizer(cfg)  # what is missing is said before anything is tried
    probe = cuda_probe(make(), device) if limit is None else cpu_probe(make, limit)
    found = search(buckets_of(cfg), aloud(probe), limit)
    probes = found["probes"]
    head = ["bucket, s", "utterances", "seconds", "peak, GiB", "of", "tries"]
    body = []
    for bucket, count in found["utterances"].items():
        mine = [probe for probe in probes if probe.bucket == bucket]
        peak = next(probe.peak for probe in mine if probe.utterances == count and probe.fits)
        body.append([f"{bucket:g}", str(count), f"{bucket * count:.0f}", f"{peak / 2**30:.2f}",
                     f"{total / 2**30:.2f}", str(len(mine))])
    advice = (f"{args.recipe} on {args.corpus}, {precision}, {density:.1f} characters a second: a batch can hold "
              f"{found['seconds']:.0f} s of audio on this device (training.global_batch_seconds over devices and "
              "accumulated batches).")
    save(args.json, "batch", __doc__, argv, machine, head, body, args.note, seconds=found["seconds"], limit_bytes=total,
         density=density, precision=precision, recipe=args.recipe, corpus=args.corpus,
         probes=[probe._asdict() for probe in probes], remarks=[advice])
    print("\n".join([table(head, body), advice]))


def _free_gib() -> float:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


if __name__ == "__main__":
    sys.exit(main())
