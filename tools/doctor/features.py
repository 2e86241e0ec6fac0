"""Features as training sees them: finite, varied, of a sensible scale, independent of padding, not masked away."""

from __future__ import annotations

from itertools import combinations
from statistics import median

import torch

from tools.doctor.finding import Finding, Plot
from tools.doctor.locality import order
from tools.doctor.probe import relative, untouched
from tools.doctor.registry import NotExamined, check

STRETCHES = 10  # of an utterance, changed one after the other
OFF = 1.12  # frames made by frames counted, from which on they are not of one hop
CONSTANT = 1e-3  # standard deviation over time under which a mel bin says nothing


def front_end(probe, items, train: bool = False):
    """The preprocessor's (B, D, T) and lengths; its own chance (dither) only in train mode."""
    audio, lengths = probe.audio_batch(items)
    probe.model.preprocessor.train(train)
    for module in probe.model.preprocessor.modules():
        module.training = train
    x, kept = probe.model.preprocessor(input_signal=audio, length=lengths)
    return x.detach().float(), kept.detach().long()


def _bad(symptom, cause, evidence, fix, confidence=0.9, weight="prevents", plots=()) -> Finding:
    return Finding("features-bad", weight, symptom, cause, evidence, fix, confidence, where="preprocessor",
                   plots=list(plots))


@check("features", faults=("features-bad",), needs=("model",))
def features_are_usable(subject):
    """Features are finite, vary over time, and are of a sensible scale."""
    probe = subject.probe
    items = probe.items()
    with untouched(probe.model), torch.no_grad():
        x, lengths = front_end(probe, items)
    if x.dim() != 3:
        raise NotExamined(f"features have {x.dim()} axes, not (B, D, T)")
    valid = [x[i, :, : int(n)] for i, n in enumerate(lengths)]
    if not all(bool(torch.isfinite(v).all()) for v in valid):
        share = sum(float((~torch.isfinite(v)).float().mean()) for v in valid) / len(valid)
        yield _bad(f"{share:.1%} of the features of {len(items)} utterances are not finite.",
                   "A logarithm of 0, a division by a standard deviation of 0, or audio that is not finite itself. One "
                   "such "
                   "batch poisons running statistics for good.", {"share": share},
                   ["model.preprocessor.log_zero_guard_value=5.96e-8; add a small constant before log and to the "
                    "standard "
                    "deviation"], 0.97)
        return
    frames = torch.cat(valid, dim=1)  # (D, all T)
    spread = torch.stack([v.std(dim=1) for v in valid]).mean(dim=0)
    rms, mean = float(frames.square().mean().sqrt()), float(frames.mean())
    dead = int((spread < CONSTANT * max(rms, 1e-6)).sum())
    bins = list(range(len(spread)))
    plots = [Plot("Features by mel bin", "mel bin", "", {"mean": (bins, frames.mean(dim=1).tolist()),
                                                          "spread over time": (bins, spread.tolist())})]
    evidence = {"mean": mean, "root mean square": rms, "spread over time (median bin)": float(spread.median()),
                "bins that do not vary": f"{dead} of {len(spread)}"}
    if dead > 0.5 * len(spread):
        yield _bad(f"{dead} of {len(spread)} features do not vary over time.",
                   "What reaches the encoder is the same whatever is said: wrong window, an amplitude lost under the "
                   "floor "
                   "of the logarithm, or normalisation over the wrong axis.", evidence,
                   ["model.preprocessor.normalize=per_feature; check the audio's scale and the mel filters' "
                    "range"], 0.95,
                   plots=plots)
        return
    if dead > 0.1 * len(spread):
        yield _bad(f"{dead} of {len(spread)} mel bins are constant.",
                   "Filters above half of the audio's true sampling rate, or so narrow that no FFT bin falls into "
                   "them.",
                   evidence, ["fewer mel bins (model.preprocessor.features), a larger n_fft, or the audio's true rate"],
                   0.7, "warning", plots)
    centred = frames - frames.mean(dim=1, keepdim=True)
    tail = float((centred / centred.std().clamp(min=1e-9)).pow(4).mean())
    if rms > 50 or rms < 0.02:
        yield _bad(f"Features have a root mean square of {rms:.3g}; networks expect about 1.",
                   "They are not normalised, or not on a logarithmic scale: the first layer saturates or sees nothing, "
                   "and "
                   "the learning rate fits no longer.", {**evidence, "kurtosis": tail},
                   ["model.preprocessor.normalize=per_feature", "model.preprocessor.log=true"], 0.9,
                   "prevents" if rms > 500 or rms < 2e-3 else "warning", plots)
    elif tail > (20 if any(item.row for item in items) else 60):
        yield _bad(f"Features are rare spikes (kurtosis {tail:.0f}; log-mel features have 2 to 6).",
                   "Power is not taken to a logarithm: loud frames are all that the model sees.",
                   {**evidence, "kurtosis": tail}, ["model.preprocessor.log=true"], 0.85, "warning", plots)
    elif rms > 5 and abs(mean) > 2 * float(spread.median()):
        yield _bad(f"Features lie around {mean:.1f} and vary by {float(spread.median()):.1f}: they are not normalised.",
                   "The first layer sees a large constant and a small signal. Batch normalisation behind it mends "
                   "that; "
                   "without one, learning starts slowly.", evidence, ["model.preprocessor.normalize=per_feature"], 0.5,
                   "warning", plots)


@check("features", faults=("features-bad",), needs=("model",))
def dither_is_small(subject):
    """Dither in training does not drown the features."""
    probe = subject.probe
    items = probe.items()
    with untouched(probe.model), torch.no_grad():
        torch.manual_seed(0)
        still, lengths = front_end(probe, items)
        noisy, _ = front_end(probe, items, train=True)
    if still.shape != noisy.shape or not bool(torch.isfinite(still).all() & torch.isfinite(noisy).all()):
        raise NotExamined("features of train and eval mode cannot be compared")
    mask = (torch.arange(still.shape[2], device=still.device)[None] < lengths[:, None])[:, None].expand_as(still)
    a, b = still[mask], noisy[mask]
    together = float(torch.corrcoef(torch.stack([a, b]).double())[0, 1])
    if together < 0.6:
        yield _bad(f"Features in training have a correlation of {together:.2f} with those in evaluation.",
                   "Noise that is added in training (dither) drowns the speech: it is scaled for integers, the audio "
                   "is in "
                   "-1 to 1.", {"correlation": together},
                   ["model.preprocessor.dither=1e-5"], 0.9, "prevents" if together < 0.3 else "warning")


@check("features", faults=("norm-padding", "batch-leak"), needs=("model",))
def features_leave_the_batch_out(subject):
    """Features of an utterance depend neither on padding nor on the rest of the batch."""
    probe = subject.probe
    item = min(probe.items(), key=lambda i: len(i.audio))
    with untouched(probe.model), torch.no_grad():
        alone, lengths = front_end(probe, [item])
        audio, size = probe.audio_batch([item])
        probe.model.preprocessor.eval()
        padded, _ = probe.model.preprocessor(
            input_signal=torch.nn.functional.pad(audio, (0, audio.shape[1])), length=size)
        louder = torch.cat([audio, audio.flip(1) * 20, audio * 0.01])
        beside, _ = probe.model.preprocessor(input_signal=louder, length=size.repeat(3))
    if beside.shape[2] == alone.shape[2] and relative(beside[0].float() - alone[0], alone[0].T) > 0.03:
        yield Finding(
            "batch-leak", "prevents",
            "With louder and softer utterances beside it, the same utterance has features that differ by "
            f"{relative(beside[0].float() - alone[0], alone[0].T):.0%} of their spread.",
            "Features are normalised over the batch, not over each utterance: what is learned hangs on who shares a "
            "batch.",
            {"relative change": relative(beside[0].float() - alone[0], alone[0].T)},
            ["mean and standard deviation over an utterance's own frames (model.preprocessor.normalize=per_feature)"],
            0.9, where="preprocessor",
        )
    valid = min(int(lengths[0]), padded.shape[2], alone.shape[2]) - 3  # the last windows hang over the end
    one, two = alone[0, :, :valid].T, padded[0, :, :valid].float().T
    if valid < 8 or not bool(torch.isfinite(one).all() & torch.isfinite(two).all()):
        raise NotExamined("features are too few or not finite")
    change = relative(one - two, one)
    if change > 0.03:
        yield Finding(
            "norm-padding", "prevents" if change > 1 else "warning",
            f"With padding as long as itself, an utterance has features that differ by {change:.0%} of their spread.",
            "Normalisation of the features counts the padding: mean and variance are those of speech and zeros. The "
            "same "
            "utterance looks different in every batch, and alone (as in evaluation) other than in training.",
            {"relative change": change},
            ["normalise with the lengths: mean and standard deviation over the valid frames (NeMo: "
             "normalize=per_feature "
             "with the true lengths)"],
            0.92, where="preprocessor",
        )


@check("features", faults=("time-scrambled",), needs=("model",))
def features_keep_time(subject):
    """Features are in the order of the audio."""
    probe = subject.probe
    item = max(probe.items(), key=lambda i: len(i.audio))
    with untouched(probe.model), torch.no_grad():
        audio, size = probe.audio_batch([item])
        probe.model.preprocessor.eval()
        clean, lengths = probe.model.preprocessor(input_signal=audio, length=size)
        moves = []
        count = audio.shape[1]
        for s in range(10):
            changed = audio.clone()
            part = slice(s * count // 10, (s + 1) * count // 10)
            noise = torch.randn(changed[:, part].shape, generator=torch.Generator().manual_seed(s))
            changed[:, part] += 0.3 * noise.to(audio)
            x, _ = probe.model.preprocessor(input_signal=changed, length=size)
            moves.append((x - clean)[0, :, : int(lengths[0])].float().square().mean(dim=0).sqrt())
    moves = torch.stack(moves)
    if moves.shape[1] < 20 or not bool(torch.isfinite(moves).all()):
        raise NotExamined("features are too few or not finite")
    together, place = order(moves)
    if together < 0.5:
        yield Finding(
            "time-scrambled", "prevents",
            f"Features are not in the order of the audio (correlation {together:.2f}; 1 is right).",
            "The preprocessor flips or reshapes time.", {"correlation": together},
            ["features are (B, mel bins, frames): transpose, do not reshape"], 0.9, where="preprocessor",
            plots=[Plot("Where each feature frame looks", "frame / all", "audio / all",
                        {"seen": ([(i + 0.5) / len(place) for i in range(len(place))], place)})],
        )


def _wiped(before: torch.Tensor, after: torch.Tensor) -> float:
    """Share of values that were replaced by one constant, as masks do; a warp or noise changes all and wipes none."""
    changed = after[after != before]
    if not len(changed):
        return 0.0
    return float((changed == changed.mode().values).sum()) / before.numel()


@check("features", faults=("augmentation-too-strong",), needs=("model",))
def augmentation_leaves_speech(subject):
    """Augmentation leaves most of the input."""
    probe = subject.probe
    masks = getattr(probe.model, "spec_augmentation", None)
    if masks is None:
        return
    shares = []
    with untouched(probe.model), torch.no_grad():
        torch.manual_seed(0)
        masks.train()
        x, lengths = probe.features()
        marked = torch.where(x == 0, torch.full_like(x, 1e-3), x)
        for _ in range(10):
            masked = masks(input_spec=marked.clone(), length=lengths)
            for i, n in enumerate(lengths.tolist()):
                shares.append(_wiped(marked[i, :, :n], masked[i, :, :n]))
    share = sum(shares) / len(shares)
    if share > 0.6:
        settings = subject.settings
        numbers = {key: settings.get(f"model.spec_augment.{key}") for key in
                   ("freq_masks", "freq_width", "time_masks", "time_width")} if settings is not None else {}
        shares.sort()
        yield Finding(
            "augmentation-too-strong", "prevents" if share > 0.8 else "warning",
            f"Augmentation masks {share:.0%} of the features on average; the masks of NeMo's Conformer recipe "
            "(2 of 27 bins, 10 of 5 % of the time) take about half, and that recipe is for 960 hours.",
            "Most of what is to be recognised is not there: the loss stays high, and a fresh model falls back on "
            "blanks.",
            {"share masked": share, "a tenth of utterances over": shares[int(0.9 * len(shares))], **numbers},
            ["model.spec_augment.time_width=0.05 model.spec_augment.time_masks=2 model.spec_augment.freq_width=15, or "
             "none "
             "(model.spec_augment=null) until one batch is learned"],
            0.9, where="model.spec_augment",
            plots=[Plot("Share masked", "share of an utterance", "share of draws below",
                        {"draws": (shares, [(i + 1) / len(shares) for i in range(len(shares))])})],
        )


@check("features", faults=("length-mismatch",), needs=("model",))
def features_follow_the_audio(subject):
    """Feature frames are those of the whole audio, as many as the front end says."""
    probe = subject.probe
    with untouched(probe.model), torch.no_grad():
        traced = [_places(probe, item, seed) for seed, item in enumerate(probe.items())]
    rise, unheard = (median(values) for values in list(zip(*traced))[:2])
    if unheard > 0.4 or not 0.4 < rise < 2.5:
        return  # out of order: that is time-scrambled, and told there
    if 1 / OFF < rise < OFF and not unheard:
        return
    frames, seconds, places = traced[0][2]
    lost = max(1 - 1 / rise if rise > OFF else 0.0, unheard)
    yield Finding(
        "length-mismatch",
        "prevents" if max(lost, 1 - rise) > 0.1 else "warning",
        f"About {lost:.0%} of each utterance leaves no trace in its features." if 1 / OFF < rise < OFF else
        f"The front end says {frames} frames for audio of {seconds:.2f} s, whose features take {frames * rise:.0f}: "
        + (f"{lost:.0%} of each utterance is not heard." if lost else "the rest is no speech."),
        "Frames are counted by another hop, window or sampling rate than they are made by. The encoder, the loss and "
        "decoding go by the count.",
        {"frames made, by frames counted": round(rise, 3), "not heard": round(lost, 3),
         "where tenths of the audio come out, of the returned length": [round(place, 3) for place in places]},
        ["count frames as they are made: samples // hop + 1 with the hop of the spectrogram (NeMo's "
         "FilterbankFeatures.get_seq_len)"],
        0.9,
        where="preprocessor",
        plots=[Plot("Where the audio comes out", "time in the audio / all", "feature frame / returned length",
                    {"seen": ([(s + 0.5) / STRETCHES for s in range(STRETCHES)], places),
                     "right": ([0.0, 1.0], [0.0, 1.0])})],
    )


def _places(probe, item, seed: int):
    """Changes one stretch of an utterance after the other, and looks where its features change.

    Returns (slope of the place in the features, by the returned length, over that in the audio; share of stretches
    that do not show where they should by it; (frames returned, seconds, the places)).
    """
    still, lengths = front_end(probe, [item])
    frames, count = int(lengths[0]), len(item.audio)
    if frames < 40 or not bool(torch.isfinite(still).all()):
        raise NotExamined(f"{frames} frames of features, or features that are not finite")
    audio, size = probe.audio_batch([item])
    noise = torch.randn(audio.shape, generator=torch.Generator().manual_seed(seed)).to(audio) * audio.std()
    changes = []
    for s in range(STRETCHES):
        begin, end = s * count // STRETCHES, (s + 1) * count // STRETCHES
        changed = audio.clone()
        changed[:, begin:end] = noise[:, begin:end]
        x, _ = probe.model.preprocessor(input_signal=changed, length=size)
        if x.shape != still.shape:
            raise NotExamined("the front end gives other frames for other audio of the same length")
        changes.append((x.float() - still)[0].square().mean(dim=0).sqrt())
    # Normalisation moves all frames, and loud ones of features without a logarithm most, whatever stretch is changed.
    moved = torch.stack(changes)
    moved = moved / (moved.median(dim=0).values + 1e-3 * moved.max())
    most = moved.topk(min(max(frames // (2 * STRETCHES), 3), moved.shape[1])).indices
    places = [float(place) / frames for place in most.double().median(dim=1).values]
    # A line through most of them, whatever the others do.
    rise = median(STRETCHES * (places[b] - places[a]) / (b - a) for a, b in combinations(range(STRETCHES), 2))
    off = [place - rise * (s + 0.5) / STRETCHES for s, place in enumerate(places)]
    lost = sum(abs(value - median(off)) > 1 / STRETCHES for value in off) / STRETCHES
    return rise, lost, (frames, count / probe.sample_rate, places)
