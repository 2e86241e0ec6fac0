"""What the samples of utterances drawn at random say: silence, clipping, scale, a missing upper band. No torch.

Of utterances in shards (manifests/shards_format.py), whose headers the validator leaves alone, also whether they are
where their rows say, and as their rows say.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
from collections import defaultdict
from functools import partial

import numpy as np
import soundfile

from manifests.shards_format import ShardError, is_sharded, read_shard
from tools.doctor.finding import Finding, Plot
from tools.doctor.loading import SECTIONS, makes_mono
from tools.doctor.registry import NotExamined, check
from tools.doctor.subject import Subject

SAMPLED = {"train": 120, "validation": 40, "test": 40}  # utterances read of each role
LONGEST = 20.0  # seconds read of each
SILENT, QUIET, LOUD = 3e-4, 3e-3, 1.05  # peak amplitudes, full scale is 1
CLIPPED = 1e-3  # share of samples that lie on a flat top
MANY = 0.2
WHITE, ALIKE, HISSES, SHORTEST = 0.42, 3.0, 0.08, 0.4  # of white, dB of spread, of white, seconds; measured in noise.py
READ = 2**31  # bytes, at most, that are read to compare files
INTEGERS = 8.0  # a peak that no codec, resampler or gain explains: samples that were never divided
OFF = 0.05  # seconds between a row's duration and its audio's, as the validator takes it for single files
FAR, FAR_SHARE, ROUNDED = 0.5, 0.1, 0.1  # seconds, share of the audio, seconds: see far_off


def far_off(off: float, seconds: float) -> bool:
    """Whether a duration that is `off` by so many seconds, of `seconds` of audio, does harm; rounding does not."""
    return abs(off) > FAR or abs(off) > max(FAR_SHARE * seconds, ROUNDED)


def sampled_audio(subject: Subject) -> list[dict]:
    """Figures of the utterances drawn: role, row, at, file, peak, rms, mean, flat, spread, high, white; made once.

    flat: share of samples in runs of 3 or more at the largest amplitude; spread: dB between loud and quiet frames;
    high: share of energy above 55 % of the highest frequency that the model hears, up to that; white: see whiteness;
    finite; seconds; rate: the file's, or the model's where that is lower.
    Raises NotExamined where none can be read.
    """
    if not hasattr(subject, "_audio_figures"):
        figures = []
        for role in SAMPLED:
            for row in drawn_rows(subject, role):
                found = measure(row, subject.sample_rate)
                if found is not None:
                    figures.append({"role": role, "row": row, "at": row["_at"], "file": row["audio_filepath"], **found})
        subject._audio_figures = figures
    if not subject._audio_figures:
        drawn = [row for role in SAMPLED for row in drawn_rows(subject, role)]
        if any(in_foreign_tar(row) for row in drawn):
            raise NotExamined("the audio is in tar files, and the rows do not say where in them (no tar_offset): "
                              "python -m manifests.shards writes rows that do")
        raise NotExamined(f"none of the {len(drawn)} utterances drawn can be read" if drawn else "no utterances")
    return subject._audio_figures


def drawn_rows(subject: Subject, role: str) -> list[dict]:
    """The rows of a role whose audio is read, drawn at random, in the manifest's order."""
    rows = subject.rows.get(role, [])
    chosen = random.Random(subject.seed).sample(range(len(rows)), min(SAMPLED[role], len(rows)))
    return [rows[i] for i in sorted(chosen)]


def in_foreign_tar(row: dict) -> bool:
    """Whether a row's audio is in a tar at a place that nothing says: NeMo's own shards."""
    return ("shard_id" in row or "_tarred" in row) and not is_sharded(row)


def opened(row: dict) -> soundfile.SoundFile:
    """A row's audio file, be it in a shard. Raises RuntimeError, OSError or ValueError where it cannot be read."""
    path = row["audio_filepath"]
    return soundfile.SoundFile(io.BytesIO(read_shard(path, row)) if is_sharded(row) else path)


def read(row: dict) -> tuple[np.ndarray, int] | None:
    """(samples of up to LONGEST s, rate) of one utterance, of the channel that its loader takes; None where it cannot
    be read."""
    try:
        with opened(row) as file:
            rate = file.samplerate
            file.seek(round(row.get("offset", 0) * rate))
            x = file.read(round(min(row["duration"], LONGEST) * rate), dtype="float32", always_2d=True)
            return _of_channel(x, row.get("_channel")), rate
    except (RuntimeError, OSError, ValueError):
        return None


def read_at(row: dict, rate: int) -> np.ndarray:
    """A row's samples at a rate; of several channels those that its loader takes. Raises where they cannot be read."""
    if "_channel" not in row:
        from recipes.data import read_audio

        return read_audio(row, rate)
    import soxr

    if (found := read(row)) is None or not len(found[0]):
        raise ValueError(f"{row['audio_filepath']}: no audio can be read")
    samples, own = found
    return samples if own == rate else soxr.resample(samples, own, rate)


def _of_channel(x: np.ndarray, chosen) -> np.ndarray:
    """One channel of samples (time, channels): the one chosen by its number, else the mean of all."""
    if isinstance(chosen, list) and len(chosen) == 1:
        chosen = chosen[0]
    one = isinstance(chosen, int) and not isinstance(chosen, bool) and 0 <= chosen < x.shape[1]
    return x[:, chosen] if one else x.mean(axis=1)


def measure(row: dict, heard: int | None = None) -> dict | None:
    """Figures of one utterance's samples (see sampled_audio); None where it cannot be read."""
    found = read(row)
    return None if found is None else measured(*found, heard)


def measured(x: np.ndarray, rate: int, heard: int | None = None) -> dict | None:
    """Figures of samples; None for fewer than a frame. heard: the model's rate, where it may be lower."""
    if len(x) < 400:
        return None
    finite = bool(np.isfinite(x).all())
    x = np.nan_to_num(x.astype(np.float64))
    size = np.abs(x)
    peak = float(size.max())
    # Flat tops: clipping repeats the very same largest value, speech touches it for a sample or two.
    at_top = np.concatenate([[0], (size >= peak * 0.9999).astype(np.int8), [0]]) if peak > 0 else np.zeros(2, np.int8)
    edges = np.flatnonzero(np.diff(at_top))
    runs = edges[1::2] - edges[::2]
    frames = x[: len(x) // 400 * 400].reshape(-1, 400)
    level = 10 * np.log10(frames.var(axis=1) + 1e-20)  # a constant offset is no sound
    spectrum = np.abs(np.fft.rfft(frames * np.hanning(400), axis=1)) ** 2
    total = float(spectrum[:, 2:].sum())
    top = 200 * min(heard or rate, rate) / rate  # of the 200 frequencies those that are left at the model's rate
    return {
        "peak": peak, "rms": float(np.sqrt((x**2).mean())), "mean": float(x.mean()), "finite": finite,
        "seconds": len(x) / rate,
        "flat": float(runs[runs >= 3].sum() / len(x)),
        "spread": float(np.percentile(level, 95) - np.percentile(level, 10)),
        "high": float(spectrum[:, int(0.55 * top): int(top) + 1].sum() / total) if total > 0 else 0.0,
        "rate": min(heard or rate, rate),
        "white": whiteness(spectrum[level >= max(np.percentile(level, 70), level.max() - 25)]),
    }


def whiteness(spectrum: np.ndarray) -> float:
    """Geometric by arithmetic mean of the power (frames, frequencies), median over frames; 0.56 for white noise."""
    power = spectrum[:, 2:-2] + 1e-30
    return float(np.median(np.exp(np.log(power).mean(axis=1)) / power.mean(axis=1)))


def same_audio(rows: list[dict], others: list[dict] | None = None, most: int = READ
               ) -> tuple[list[tuple[dict, dict]], int]:
    """(pairs of rows under different paths whose files hold the same bytes: within `rows`, or of `rows` and `others`;
    how many pairs were left uncompared, once `most` bytes had been read).

    Files are read only where text, duration and size agree.
    """
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        groups[row["text"], round(row["duration"], 2)].append(row)
    pairs, digests = [], _Digests()
    if others is None:
        candidates = [(members[0], member) for members in groups.values() for member in members[1:]]
    else:
        candidates = [(first, other) for other in others
                      for first in groups.get((other["text"], round(other["duration"], 2)), ())[:3]]
    for at, (first, second) in enumerate(candidates):
        if digests.read > most:
            return pairs, len(candidates) - at
        paths = first["audio_filepath"], second["audio_filepath"]
        if paths[0] == paths[1] or first.get("offset") or second.get("offset"):
            continue
        try:
            if _same_bytes(first, second, digests):
                pairs.append((first, second))
        except (OSError, ShardError):
            continue  # missing audio is told elsewhere
    return pairs, 0


class _Digests(dict):
    """"file:line" of a row -> digest of its file; `read`: bytes of all that were."""

    read = 0

    def of(self, row: dict) -> bytes:
        if is_sharded(row):
            content = read_shard(row["audio_filepath"], row)
        else:
            with open(row["audio_filepath"], "rb") as file:
                content = file.read()
        self.read += len(content)
        return hashlib.sha1(content).digest()


def _same_bytes(first: dict, second: dict, digests: _Digests) -> bool:
    """Whether two rows' files hold the same; what was read of the first is kept in `digests`, links are not read."""
    if not is_sharded(first) and not is_sharded(second):
        one, two = (os.stat(row["audio_filepath"]) for row in (first, second))
        if os.path.samestat(one, two):
            return True
        sizes = one.st_size, two.st_size
    else:
        sizes = tuple(row["tar_bytes"] if is_sharded(row) else os.path.getsize(row["audio_filepath"])
                      for row in (first, second))
    if sizes[0] != sizes[1]:
        return False
    if first["_at"] not in digests:
        digests[first["_at"]] = digests.of(first)
    return digests[first["_at"]] == digests.of(second)


def by_role(figures: list[dict], test) -> dict[str, list[dict]]:
    """Role -> figures that pass `test`, roles without any left out."""
    found: dict[str, list[dict]] = {}
    for figure in figures:
        if test(figure):
            found.setdefault(figure["role"], []).append(figure)
    return found


def _is_silent(figure: dict) -> bool:
    # Nothing at all, or no loud and quiet parts: a hum or hiss at the lowest level is no speech.
    return figure["finite"] and (figure["peak"] < 1e-6 or (figure["peak"] < QUIET and figure["spread"] < 10)
                                 or figure["rms"] < 1e-7)


def is_noise(figure: dict) -> bool:
    """Whether there is sound in it, and none of it can be speech: what is loudest is white, or all is alike and hisses.

    Speech has pauses and syllables, and what is loudest in it are vowels, whose spectrum falls.
    """
    if not figure["finite"] or figure["seconds"] < SHORTEST or _is_silent(figure):
        return False
    return figure["white"] > WHITE or (figure["spread"] < ALIKE and figure["white"] > HISSES)


def findings_of(
    subject, hits, figures, fault, symptom, cause, fix, least=MANY, key="peak", confidence=0.95, top="prevents"
):
    """One finding a role: "prevents" from a share of `least` of the training utterances drawn."""
    for role, hit in hits.items():
        drawn = sum(figure["role"] == role for figure in figures)
        share = len(hit) / drawn
        yield Finding(
            fault,
            top if role == "train" and share >= least else "warning",
            f"{len(hit)} of {drawn} utterances drawn from {role} {symptom}: {hit[0]['file']}.",
            cause,
            {"share": round(share, 3), "drawn": drawn, key: [round(figure[key], 6) for figure in hit[:5]],
             "files": [figure["at"] for figure in hit[:5]]},
            fix,
            confidence,
            where=hit[0]["at"],
            plots=[_histogram(figures, role, key)],
        )


def _histogram(figures, role, key) -> Plot:
    values = sorted(figure[key] for figure in figures if figure["role"] == role)
    shares = [(i + 1) / len(values) for i in range(len(values))]
    return Plot(f"{key} of the utterances drawn from {role}", key, "share of utterances "
                                                                   "below", {role: (values, shares)})


@check("audio", faults=("data-silence",), needs=("manifests",))
def silence(subject):
    """Audio holds sound."""
    figures = sampled_audio(subject)
    for role, hit in by_role(figures, _is_silent).items():
        for finding in findings_of(
            subject, {role: hit}, figures, "data-silence", "hold no sound",
            "The files were written empty, or the wrong channel or part was cut out; the model is taught that silence "
            "means words.",
            ["listen to the files named; write them again from the originals, or drop them"],
        ):
            _tell_channel(subject, finding, role, [figure["row"] for figure in hit[:5]])
            yield finding


def _tell_channel(subject, finding: Finding, role: str, rows: list[dict]) -> None:
    """Adds to a finding of silence that it is that of the channel which is selected, where another one holds sound."""
    chosen = rows[0].get("_channel")
    if chosen is None or any(_is_silent(measure({**row, "_channel": None})) for row in rows):
        return
    key = subject.settings.key(f"model.{SECTIONS[role]}.channel_selector")
    finding.symptom += f" It is channel {chosen} of them, which {key} selects; another one holds sound."
    finding.evidence["channel"] = chosen
    finding.fix = [f"{key}=the number, from 0, of the channel that has the speech"]


@check("audio", faults=("data-clipped",), needs=("manifests",))
def clipping(subject):
    """Audio is not clipped."""
    figures = sampled_audio(subject)
    yield from findings_of(
        subject, by_role(figures, lambda f: f["flat"] > CLIPPED and not _is_silent(f) and not is_noise(f)), figures,
        "data-clipped", "are clipped (their waves have flat tops)",
        "They were recorded or scaled too loud: all above full scale is cut off, which adds sounds that were not "
        "spoken. A little of it does little harm, much of it hides the speech.",
        ["write them again from the originals with a lower gain; do not multiply samples beyond 1.0"],
        least=0.5, key="flat", top="warning",
    )


@check("audio", faults=("data-scale",), needs=("manifests",))
def scale(subject):
    """Samples lie between -1 and 1, and use that range."""
    figures = sampled_audio(subject)
    huge = by_role(figures, lambda f: f["peak"] > INTEGERS)
    above = by_role(figures, lambda f: f["peak"] > LOUD)
    yield from findings_of(
        subject, huge, figures, "data-scale", "have samples far outside -1 to 1",
        "Integers were stored as floats without dividing by 32768. Features then lie far from those of other audio, "
        "and dither and the floor of the logarithm mean nothing.",
        ["divide by 32768 before writing, or write 16-bit PCM (soundfile.write(..., subtype='PCM_16'))"], least=0.02,
    )
    yield from findings_of(
        subject, {role: hit for role, hit in above.items() if role not in huge}, figures, "data-scale",
        f"have peaks above full scale, {max((f['peak'] for hit in above.values() for f in hit), default=0):.2f} at "
        "most",
        "Overshoot: a lossy codec (MP3, OGG) or a resampler makes peaks a little higher than they were, and floats "
        "keep what integers would cut off; or a gain was too high. It does little harm.",
        ["nothing for peaks up to 1.3; else lower the gain, or scale such files to a peak of 1"], top="warning",
        confidence=0.8,
    )
    yield from findings_of(
        subject, by_role(figures, lambda f: f["finite"] and f["peak"] < SILENT * 3 and not _is_silent(f)), figures,
        "data-scale", "are speech at less than a thousandth of full scale",
        "Samples were divided twice. The features' floor (2^-24 under the logarithm) and dither hide most of such "
        "speech.",
        ["write the audio again with its full range; peaks belong between 0.05 and 1"],
    )
    offset = by_role(figures, lambda f: abs(f["mean"]) > 0.05 and abs(f["mean"]) > 0.3 * f["rms"] and not is_noise(f))
    yield from findings_of(
        subject, offset, figures, "data-scale", "have a constant offset",
        "The waveform does not swing around zero: unsigned samples were read as signed, or the recorder has a fault.",
        ["subtract the mean of each file, or read it with its true sample format"], key="mean", least=0.5,
    )


def _no_upper_band(figure: dict) -> bool:
    # Nothing but what rounding to 16 bits leaves there: its power is 2^-30 / 12 over all frequencies.
    # Of audio that is as quiet as that all is below it, and tells nothing.
    return figure["high"] < 1e-7 or figure["rms"] > 1e-3 and figure["high"] * figure["rms"] ** 2 < 1.5e-10


@check("audio", faults=("data-sample-rate",), needs=("manifests",))
def upper_band(subject):
    """Audio has the upper frequencies that its sampling rate promises."""
    figures = [figure for figure in sampled_audio(subject) if not _is_silent(figure)]
    for role, hit in by_role(figures, _no_upper_band).items():
        drawn = sum(figure["role"] == role for figure in figures)
        if drawn >= 3 and len(hit) >= MANY * drawn:
            yield Finding(
                "data-sample-rate",
                "warning",
                f"{len(hit)} of {drawn} utterances drawn from {role} have nothing in the upper half of their band.",
                "They were resampled from half the rate or less (telephone speech). Mel bins up there hold only the "
                "floor; mixed with other audio, they make two kinds of input.",
                {"share": round(len(hit) / drawn, 3), "energy above 55 % of the band": [f["high"] for f in hit[:5]],
                 "files": [figure["at"] for figure in hit[:5]]},
                [f"train and test at the original rate: model.sample_rate={hit[0]['rate'] // 2}, with fewer mel bins"],
                0.6,
                where=hit[0]["at"],
            )


@check("audio", faults=("data-missing-audio", "data-channels", "data-duration-wrong"), needs=("manifests",))
def shards(subject):
    """Utterances in shards are where their rows say, and as their rows say."""
    sharded = {role: [row for row in drawn_rows(subject, role) if is_sharded(row)] for role in SAMPLED}
    for role, rows in sharded.items():
        lost, stereo, other, far = [], [], [], 0
        for row in rows:
            try:
                with opened(row) as file:
                    seconds = file.frames / file.samplerate
                    off = seconds - row["duration"] if "offset" not in row else 0.0
                    if file.channels != 1 and not makes_mono(subject.settings, role, file.channels):
                        stereo.append((row, f"{file.channels} channels"))
                    if abs(off) > OFF:
                        other.append((row, f"{row['duration']} s in the row, {seconds:.2f} s in the tar"))
                        far += far_off(off, seconds)
            except (ShardError, RuntimeError, OSError, ValueError) as error:
                lost.append((row, " ".join(str(error).split())))
        found = partial(_of_shards, role, len(rows))
        if lost:
            yield found("data-missing-audio", lost, "cannot be read from their shards",
                        "The manifest and the tar files are not of one run, or a copy was cut off.",
                        ["python -m manifests.shards MANIFEST --out DIR --verify names what is wrong; copy or write "
                         "those shards again"], True)
        if stereo:
            yield found("data-channels", stereo, "have more than one channel",
                        "NeMo's loaders die of them, or make a batch with one axis too many.",
                        ["mix down to one channel and write the shards again"], True)
        if other:
            yield found("data-duration-wrong", other, "are not as long as their rows say",
                        "Batches are made by the rows' durations, and limits of length apply to them.",
                        ["write the shards again from a manifest that `python -m manifests.validate --audio` passes"],
                        far >= MANY * len(rows))
    if not any(sharded.values()):
        raise NotExamined("no manifest is of shards")


def _of_shards(role, drawn, fault, hit, symptom, cause, fix, stops) -> Finding:
    return Finding(
        fault, "prevents" if role == "train" and stops else "warning",
        f"{len(hit)} of {drawn} utterances drawn from the shards of {role} {symptom}: {hit[0][0]['_at']}: {hit[0][1]}.",
        cause, {"share": round(len(hit) / drawn, 3), "drawn": drawn,
                "first": [f"{row['_at']}: {what}"[:200] for row, what in hit[:5]]}, fix, 1.0, where=hit[0][0]["_at"])
