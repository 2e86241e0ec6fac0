"""Do audio and text belong together? Told without a model, two ways (a third, by transcripts, in transcripts.py):

- from lengths: who says more takes longer. Over a whole manifest the logarithms of duration and text length go
  together (0.8 to 0.95 on speech that is read); of pairs drawn at random they do not;
- from the share of utterances whose length does not go with their text, as a mixture of two distributions, of pairs
  that belong together and of pairs drawn at random from the same manifest.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from tools.doctor.causes import CUT_SHORT
from tools.doctor.finding import Finding, Plot
from tools.doctor.registry import NotExamined, check

FEWEST = 20  # pairs, fewer say nothing
UNRELATED = 0.35  # correlation of log duration and log length under which pairs do not belong together
SPELT = 2.0  # times as long or short are the words of validation, where they are spelt by other rules
EXPECTED = 30  # times that a character would be in validation, were it as frequent as in train
LOOSE = 0.65  # under which some of them may not
RATES = 0.16  # spread of log speaking rates between utterances; as in 8 h of LibriSpeech
BLOCK = 60  # neighbouring lines looked at together
CAUSE = (
    "Texts and audio were joined in different orders: a line was lost on one side, a list was sorted or shuffled "
    "alone. "
    "The loss then falls to that of the letters' frequencies and stays there."
)
FIX = [
    "listen to the utterances named; build the manifest again, joining audio and text by utterance id, not by position",
    "for LibriSpeech: python -m manifests.librispeech reads both from the same tree",
]
FAR, ONE_SIDED = 4.0, 0.8  # spreads from the usual length; share of such rows that are shorter
CUT_OFF = ("The audio was cut off, or the texts go on where it ends. Were they the texts of other audio, as many would be too short "
           "for theirs.")
WHOLE = ["cut the audio of these rows again, or take them out: what is not heard cannot be learned"]


@check("pairs", faults=("data-mismatched-text",), needs=("manifests",))
def lengths_go_together(subject):
    """Longer texts are longer speech."""
    judged = False
    for role, rows in subject.rows.items():
        rows = [row for row in rows if len(row["text"].strip()) > 1]
        if len(rows) < FEWEST:
            continue
        duration = np.log([row["duration"] for row in rows])
        length = np.log([len(row["text"]) for row in rows])
        if duration.std() < 0.05 or length.std() < 0.08:
            continue  # all of a length: nothing to go by
        judged = True
        together = float(np.corrcoef(duration, length)[0, 1])
        if together < UNRELATED:
            # Utterances cut to a length, or one word each, have little to go by: no verdict from so little.
            spread = length.std() > 0.12 and duration.std() > 0.1
            sure = spread and (len(rows) >= 50 or len(rows) >= 30 and together < 0.2)
            yield Finding(
                "data-mismatched-text",
                "prevents" if role == "train" and sure else "warning",
                f"In {role}, longer texts are not longer speech: the correlation of text length and duration over "
                f"{len(rows)} utterances is {together:.2f}; in speech whose texts belong to it, it is 0.8 to 0.95.",
                CAUSE,
                {"correlation": round(together, 3), "utterances": len(rows)},
                FIX,
                0.9 if sure and together < 0.2 else 0.6,
                where=rows[0]["_at"].rpartition(":")[0],
                plots=[scatter(rows, role)],
            )
        else:
            partial = list(_partial(role, rows, duration)) if len(rows) >= 100 else []
            yield from partial
            # Where all last about as long, what is left of the lengths of the texts is how fast people speak.
            expected = duration.std() / np.hypot(duration.std(), RATES)
            if not partial and together < LOOSE * min(expected / 0.9, 1) and len(rows) >= 60 and length.std() > 0.12:
                yield _loose(role, rows, together)
    if not judged:
        raise NotExamined(f"takes {FEWEST} utterances of different lengths")


def _loose(role: str, rows: list[dict], together: float) -> Finding:
    return Finding(
        "data-mismatched-text",
        "warning",
        f"In {role}, text length and duration of {len(rows)} utterances go together less than in read speech: "
        f"correlation {together:.2f}, where 0.8 to 0.95 is usual.",
        "A part of the texts may belong to other audio; long pauses or music in the audio look the same.",
        {"correlation": round(together, 3), "utterances": len(rows)},
        FIX,
        0.6,
        where=rows[0]["_at"].rpartition(":")[0],
        plots=[scatter(rows, role)],
    )


def scatter(rows: list[dict], role: str) -> Plot:
    """Duration against length of text, 400 points at most."""
    some = rows[:: max(len(rows) // 400, 1)]
    order = sorted((len(row["text"]), row["duration"]) for row in some)
    return Plot("Length of text and of speech", "characters", "seconds", {role: tuple(map(list, zip(*order)))},
                "a narrow rising cloud is healthy")


def _partial(role: str, rows: list[dict], duration: np.ndarray):
    """A part of the pairs that does not belong together: a block of lines, or some everywhere."""
    residual, random_pairs = residuals(rows, duration)
    # The weaker the bond between text and duration, the less a part of it can be told apart.
    if random_pairs.std() < 1.9 * _spread(residual):
        return
    block = _worst_block(residual, random_pairs)
    share, gain = mixture(residual, random_pairs)
    if block is None and (share < 0.06 or gain < 12):
        return
    if block is not None:
        first, last = block
        symptom = (f"From {rows[first]['_at']} to {rows[last]['_at']} the texts of {role} do not go with the length of "
                   "the speech, elsewhere they do.")
        share = max(share, (last - first + 1) / len(rows))
        odd = list(range(first, min(first + 5, last + 1)))
    else:
        symptom = (f"About {share:.0%} of the texts of {role} do not go with the length of their speech, the others "
                   "do.")
        odd = np.argsort(-np.abs(residual))[:5].tolist()
    far = np.flatnonzero(np.abs(residual) > FAR * _spread(residual))
    short = block is None and len(far) >= 3 and float((residual[far] < 0).mean()) > ONE_SIDED
    if short:  # other texts would be too short as often
        symptom = f"The audio of about {len(far)} rows of {role} is far shorter than their texts take to say, and of hardly any longer."
        odd = np.argsort(residual)[:5].tolist()
    yield Finding(
        "data-mismatched-text",
        "prevents" if role == "train" and share >= 0.5 else "warning",
        symptom,
        CUT_OFF if short else CAUSE,
        {**({CUT_SHORT: len(far)} if short else {}), "share": round(share, 3), "spread of log duration given the text": round(_spread(residual), 3),
         "spread if pairs were random": round(float(random_pairs.std()), 3),
         "look at": [f"{rows[i]['_at']}: {rows[i]['duration']:.2f} s, {rows[i]['text'][:60]!r}" for i in odd]},
        WHOLE if short else FIX,
        0.5 if short else 0.8 if block is not None else 0.7,
        where=rows[odd[0]]["_at"],
        plots=[scatter(rows, role)],
    )


def residuals(rows: list[dict], duration: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log duration less what the text and the speaker's pace predict: of the pairs as given, and of random pairs."""
    size = np.array([[len(row["text"]), len(row["text"].split())] for row in rows], dtype=float)
    seconds = np.exp(duration)
    weight = np.ones(len(rows))
    speakers = _groups(rows)
    pace = np.zeros(len(rows))
    predicted = np.zeros(len(rows))
    for _ in range(4):  # robust: what fits badly counts less in the next round
        design = np.column_stack([size, np.ones(len(rows))])
        scale = weight / np.maximum(seconds, 0.1)  # relative errors
        solved, *_ = np.linalg.lstsq(design * scale[:, None], seconds * np.exp(-pace) * scale, rcond=None)
        predicted = np.log(np.maximum(design @ solved, 0.1))
        for members in speakers:
            pace[members] = np.median(duration[members] - predicted[members]) * len(members) / (len(members) + 3)
        residual = duration - predicted - pace
        weight = 1 / (1 + (residual / (2 * _spread(residual))) ** 2)
    generator = np.random.default_rng(0)
    orders = [generator.permutation(len(rows)) for _ in range(5)]
    shuffled = np.concatenate([duration - predicted[shuffle] - pace for shuffle in orders])
    return residual - np.median(residual), shuffled - np.median(shuffled)


def _groups(rows: list[dict]) -> list[np.ndarray]:
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(str(row.get("speaker", "")), []).append(i)
    return [np.array(members) for members in groups.values() if len(members) >= 8]


def _spread(values: np.ndarray) -> float:
    """Standard deviation by the median absolute deviation."""
    return max(float(np.median(np.abs(values - np.median(values)))) / 0.6745, 1e-3)


def mixture(residual: np.ndarray, random_pairs: np.ndarray) -> tuple[float, float]:
    """(share of random pairs, gain in log-likelihood over none of them) of the best mixture.

    Pairs that belong together are Student's t with 5 degrees of freedom (people pause), at the best of some scales;
    random pairs are a normal distribution of the spread that permuting the texts gives.
    """
    wide = random_pairs.std()
    other = np.exp(-0.5 * (residual / wide) ** 2) / (wide * 2.5066)
    best, none = (-np.inf, 0.0), -np.inf
    for scale in _spread(residual) * np.array([0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1]):
        own = 0.3796 * (1 + (residual / scale) ** 2 / 5) ** -3 / scale
        none = max(none, float(np.log(own).sum()))
        for share in np.linspace(0.02, 0.9, 45):
            best = max(best, (float(np.log((1 - share) * own + share * other).sum()), float(share)))
    return best[1], best[0] - none


def _worst_block(residual: np.ndarray, random_pairs: np.ndarray) -> tuple[int, int] | None:
    """First and last index of a run of lines that look like random pairs among lines that do not; None without."""
    own, wide = _spread(residual), float(random_pairs.std())
    count = len(residual) // BLOCK
    if count < 3 or wide < 2.2 * own:
        return None
    spreads = np.array([_spread(residual[i * BLOCK : (i + 1) * BLOCK]) for i in range(count)])
    bad = spreads > max(0.75 * wide, 2.0 * np.percentile(spreads, 20))
    runs, start = [], None
    for i, is_bad in enumerate([*bad.tolist(), False]):
        if is_bad and start is None:
            start = i
        elif not is_bad and start is not None:
            runs.append((start, i))
            start = None
    if not runs or bad.mean() > 0.7:
        return None
    first, last = max(runs, key=lambda run: run[1] - run[0])
    return (first * BLOCK, min(last * BLOCK, len(residual)) - 1) if last - first >= 2 else None


@check("pairs", needs=("manifests",))  # what it finds is one kind only of what can be wrong with an error rate
def validation_is_spelt_as_train(subject):
    """Texts of validation are spelt by the rules of those of train."""
    train = [row["text"] for row in subject.rows.get("train", [])]
    held = [row["text"] for row in subject.rows.get("validation", [])]
    if min(len(train), len(held)) < 10:
        raise NotExamined("too few texts of train or of validation")
    counts = [Counter("".join(texts)) for texts in (train, held)]
    words = [sum(len(word) for text in texts for word in text.split()) / max(sum(len(t.split()) for t in texts), 1)
             for texts in (train, held)]
    totals = [max(sum(count.values()), 1) for count in counts]
    known = set(subject.labels or ()) or None  # what cannot be spelt at all is told elsewhere
    missing = [char for a, b in ((0, 1), (1, 0)) for char, number in counts[a].items()
               if not counts[b][char] and not counts[b][char.swapcase()] and number * totals[b] > EXPECTED * totals[a]
               and (known is None or char in known)]
    ratio = max(words) / max(min(words), 1e-9)
    if not missing and ratio < SPELT:
        return
    yield Finding(
        "metric-normalisation",
        "warning",
        f"Texts of validation are spelt otherwise than those of train: words have {words[1]:.1f} letters on average, "
        f"in train {words[0]:.1f}"
        + (f"; only in one of them is {', '.join(map(repr, missing[:6]))}." if missing else "."),
        "They were written by other rules (letters apart, no spaces, another spelling of apostrophes or hyphens). The "
        "model learns one and is measured by the other: the error rate says little, and the wrong checkpoint is kept.",
        {"letters a word": [round(value, 2) for value in words], "only in one of them": missing,
         "for instance": held[0][:80]},
        ["pass all manifests through one function (manifests.text.normalize), from their own transcripts"],
        0.85 if ratio >= SPELT else 0.6,
        where=next(iter(subject.manifests.get("validation", [])), ""),
    )
