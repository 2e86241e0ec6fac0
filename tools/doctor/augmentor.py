"""What NeMo's augmentor leaves of the speech: the waveform before and after it, compared by their loudness over time.

Not by the names of perturbations. Gain, mild noise and rooms keep the rise and fall of loudness, shifts move it,
changes of speed stretch it, strong noise covers it, and what is cut or pushed out of the window is gone from it.
"""

from __future__ import annotations

import copy
import random
from collections import Counter

import numpy as np
import torch
from omegaconf import OmegaConf

from tools.doctor.finding import Finding
from tools.doctor.probe import Item, untouched
from tools.doctor.registry import NotExamined, check

DRAWS = 8  # of each of the probe's utterances
FRAME = 0.01  # seconds
FLOOR, SPEECH = 40.0, 25.0  # dB under the loudest frames: what counts as silence, and down to where it is speech
VARIES = 6.0  # dB between loud and quiet frames, the least by which speech is known again
SPEEDS = (0.8, 0.85, 0.9, 0.95, 1.05, 1.1, 1.15, 1.2)
NEAR, CLEAR = 0.25, 0.8  # seconds by which speech may move, and the correlation from which on it may have moved further
OVERLAP = 0.25  # of the shorter of two envelopes, the least by which they are compared
# Correlation of the two envelopes in LibriSpeech, mini speech and tones, a tenth of it lower than: after white noise at
# 0 dB 0.76, 0.74, 0.84, at -10 dB 0.48, 0.46, 0.39; after a reverberation of 0.6 s 0.80, 0.76, 0.51; beside a second
# voice as loud 0.48, 0.51, 0.41. Nine tenths of it lower than: after noise at -20 dB 0.15, 0.17, 0.23.
FOLLOWS = 0.35
OUTSIDE = 0.1  # share of the speech that lies outside of the window
GONE, FALL = 0.4, 20.0  # share of the speech that fell by so many dB more than the rest; less is a mask like another
SOME, MOST = 0.25, 0.6  # share of draws
UNHEARD, OUT, CUT = "not heard any more", "out of the window", "cut out"


@check("features", faults=("augmentation-too-strong",), needs=("model",))
def augmentor_leaves_speech(subject):
    """The augmentation of waveforms leaves the speech where it is, and audible."""
    section = _section(subject)
    if not section:
        return
    lost, draws, means = _judge(subject, section)
    share = sum(lost.values()) / draws
    if share < SOME:
        return
    alone = {name: round(sum(_judge(subject, {name: own})[0].values()) / draws, 3) for name, own in section.items()}
    worst, (kind, _) = max(alone, key=alone.get), lost.most_common(1)[0]
    key = subject.settings.key(f"model.train_ds.augmentor.{worst}")
    yield Finding(
        "augmentation-too-strong", "prevents" if share > MOST else "warning",
        f"After {key if alone[worst] >= SOME else 'all that the augmentor does'} the speech is lost in {share:.0%} of {draws} draws: most often it is {kind}.",
        "The loader changes the audio and leaves the text as it was: the model is taught words that cannot be heard.",
        {"share of draws lost": round(share, 3), "draws": draws, **{kind: lost[kind] for kind in lost},
         "share lost by each alone": alone, **means, "set": section[worst]},
        [f"{key}.prob=0.0 until one batch is learned; then as mild as NeMo's defaults (a shift within 5 ms, white "
         "noise of -90 to -46 dB, other noise 10 to 50 dB below the speech)"],
        0.93, where=key,
    )


def _section(subject) -> dict | None:
    """The augmentor's section as NeMo's loader takes it, None without one."""
    found = subject.settings.get("model.train_ds.augmentor") if subject.settings is not None else None
    if not found:
        return None
    if subject.settings.get("model.train_ds.use_lhotse"):
        raise NotExamined("lhotse's loader reads no augmentor")
    if not OmegaConf.is_dict(found):
        raise NotExamined("the augmentor is no section")
    try:
        section = OmegaConf.to_container(found, resolve=True)
    except Exception as error:  # what it refers to is elsewhere
        raise NotExamined(f"the augmentor's section does not resolve ({type(error).__name__})") from None
    if not all(isinstance(own, dict) for own in section.values()):
        raise NotExamined("the augmentor's section is not of names and their settings")
    return section


def _judge(subject, section: dict) -> tuple[Counter, int, dict[str, float]]:
    """How many draws are lost, by the way in which; of how many; and the medians of what was measured."""
    from nemo.collections.asr.parts.preprocessing.features import WaveformFeaturizer
    from nemo.collections.asr.parts.preprocessing.perturb import process_augmentations
    from nemo.collections.asr.parts.preprocessing.segment import AudioSegment
    from nemo.utils import logging as nemo

    probe, lost, seen = subject.probe, Counter(), []
    items: list[Item] = [item for item in probe.items() if _varies(item.audio, probe.sample_rate)]
    if len(items) < 2:
        raise NotExamined("the utterances have no loud and quiet parts to know them by")
    with untouched(probe.model), nemo.temp_verbosity(nemo.ERROR):
        try:
            augmentor = process_augmentations(copy.deepcopy(section))
            loader = WaveformFeaturizer(probe.sample_rate, augmentor=augmentor)
            _seed(subject.seed)  # after it is built: rng among its settings seeds them too
            for item in items * DRAWS:
                audio = np.array(item.audio, dtype=np.float32)
                after = loader.process_segment(AudioSegment(audio.copy(), probe.sample_rate)).numpy()
                seen.append(compared(audio, after, probe.sample_rate))
        except Exception as error:  # noise manifests that are not here, a codec that is not installed
            why = " ".join(str(error).split())[:200]
            raise NotExamined(f"NeMo cannot make or use the augmentor: {type(error).__name__}: {why}") from None
    lost.update(kind for found in seen if (kind := way_lost(*found)) is not None)
    follows, outside, gone = np.median(np.array(seen), axis=0).tolist()
    return lost, len(seen), {"correlation of loudness, median": round(follows, 3),
                             "speech outside, median": round(outside, 3), "speech cut out, median": round(gone, 3)}


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def way_lost(follows: float, outside: float, gone: float) -> str | None:
    """The way in which speech is lost by what `compared` returns, None where it is not."""
    if outside > OUTSIDE:
        return OUT
    if follows < FOLLOWS:
        return UNHEARD
    return CUT if gone > GONE else None


def compared(before: np.ndarray, after: np.ndarray, rate: int) -> tuple[float, float, float]:
    """(correlation of loudness over time at the best lag, share of the speech outside the window, share cut out).

    before, after: samples. Where the lengths differ, what is after is taken as it is (silence put around it, a part
    cut off) and as stretched (another speed), whichever fits better.
    """
    x = envelope(before, rate)
    if len(after) < rate * FRAME * 10 or not np.isfinite(after).all() or np.ptp(after) < 1e-9:
        return 0.0, 1.0, 1.0  # nothing there, or nothing that moves
    y = envelope(after, rate)
    views = [y]
    if abs(len(y) - len(x)) > 0.01 * len(x):
        views.append(_stretched(y, len(x)))
    found = [(*best_lag(x, view), view) for view in views]
    if len(views) > 1 and max(found, key=_fit)[1] < CLEAR:  # silence around it and another speed
        found += [(*best_lag(x, view), view) for view in (_stretched(y, round(len(y) * speed)) for speed in SPEEDS)]
    _, follows, lag, y = max(found, key=_fit)
    speech = np.flatnonzero(x > np.percentile(x, 95) - SPEECH)
    place = speech + lag
    inside = (place >= 0) & (place < len(y))
    change = y[place[inside]] - x[speech[inside]]
    gone = float((change < np.percentile(change, 75) - FALL).sum()) / len(speech) if len(change) else 0.0
    return follows, 1 - float(inside.mean()), gone


def envelope(samples: np.ndarray, rate: int) -> np.ndarray:
    """Log energy (dB) of frames of 10 ms, not lower than FLOOR under the loudest."""
    step = max(round(rate * FRAME), 1)
    frames = samples[: len(samples) // step * step].astype(np.float64).reshape(-1, step)
    level = 10 * np.log10(((frames - frames.mean(axis=1, keepdims=True)) ** 2).mean(axis=1) + 1e-16)
    return np.maximum(level, np.percentile(level, 95) - FLOOR)


def _stretched(y: np.ndarray, count: int) -> np.ndarray:
    return np.interp(np.linspace(0, len(y) - 1, count), np.arange(len(y)), y)


def _fit(found: tuple) -> float:
    return found[0]


def _varies(samples: np.ndarray, rate: int) -> bool:
    level = envelope(samples, rate)
    return float(np.ptp(np.percentile(level, (10, 95)))) > VARIES


def best_lag(x: np.ndarray, y: np.ndarray) -> tuple[float, float, int]:
    """(fit, correlation, lag in frames) at which y, moved back by the lag, follows x best.

    fit: the correlation, less where they overlap in part only.

    A lag far from 0 counts only where they fit clearly: of many lags one always fits somewhat.
    """
    one, other = np.ones(len(x)), np.ones(len(y))
    x, y = x - x.mean(), y - y.mean()
    over = lambda a, b: np.correlate(a, b, "full")  # noqa: E731  at lag k - (len(x) - 1): sum of a[t + lag] b[t]
    count = np.round(over(other, one))
    mean_x, mean_y = over(other, x) / count, over(y, one) / count
    spread_x = over(other, x**2) / count - mean_x**2
    spread_y = over(y**2, one) / count - mean_y**2
    together = over(y, x) / count - mean_x * mean_y
    least = 0.01 * min(float(x.var()), float(y.var())) + 1e-9
    r = together / np.sqrt(np.maximum(spread_x, least) * np.maximum(spread_y, least))
    share = count / min(len(x), len(y))
    score = np.where(share >= OVERLAP, r * np.sqrt(share), -1.0)
    still = len(x) - 1
    near = slice(max(still - round(NEAR / FRAME), 0), still + round(NEAR / FRAME) + 1)
    best = int(np.argmax(score))
    if r[best] < CLEAR:
        best = near.start + int(np.argmax(score[near]))
    return float(score[best]), float(r[best]), best - still
