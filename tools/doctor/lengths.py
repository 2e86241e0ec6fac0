"""Lengths: those returned are those of the output, they depend on those given, and targets fit into them."""

from __future__ import annotations

import torch

from tools.doctor.finding import Finding, Plot
from tools.doctor.probe import SHORTEST
from tools.doctor.registry import NotExamined, check

LONGEST = 40.0  # seconds that are tried at most
USUAL = 320  # feature frames, at most, of an utterance that is neither long nor short
SLOW_FRONT_END = 45.0  # feature frames a second; usual are 80 to 100
MANY = 0.2  # share of utterances that do not fit from which on learning is kept from happening


class LengthRule:
    """Output frames of a model by its feature frames: floor((T + offset) / stride), learned from the model itself."""

    def __init__(self, stride: int, offset: int):
        self.stride, self.offset = stride, offset

    def __call__(self, frames: int) -> int:
        return max((frames + self.offset) // self.stride, 0)


def output_frames(probe, frames: int) -> tuple[int, int]:
    """(frames of the output, length returned) for one item of `frames` feature frames without padding."""
    x, lengths = probe.made_up_features([frames])
    out, returned = probe.forward(x, lengths)
    return out.shape[1], int(returned[0])


def length_rule(probe) -> LengthRule | None:
    """The model's own rule, exact for any chain of convolutions and poolings; None where no such rule holds.

    Nested floors of (T + a) / s are one floor((T + A) / S), so a stretch of consecutive T's and two far ones tell S
    and A. Takes the returned lengths where they follow a rule, else those of the output.
    """
    if hasattr(probe, "_length_rule"):
        return probe._length_rule
    probe._length_rule = None
    far = [output_frames(probe, frames) for frames in (100, 740)]
    for column in (1, 0):
        rise = far[1][column] - far[0][column]
        if rise <= 0:
            continue
        stride = round(640 / rise)
        seen = {100: far[0][column], 740: far[1][column]}
        seen.update((frames, output_frames(probe, frames)[column]) for frames in range(101, 102 + stride))
        for offset in range(-30 * stride, 30 * stride):
            rule = LengthRule(stride, offset)
            if all(rule(frames) == length for frames, length in seen.items()):
                probe._length_rule = rule
                return rule
    return None


@check("lengths", faults=("length-mismatch",), needs=("model",))
def returned_lengths_match(subject):
    """Returned lengths are those of the output."""
    probe = subject.probe
    with probe.ready(calibrate=False), torch.no_grad():
        x, lengths = probe.features()
        out, returned = probe.forward(x, lengths)
        pairs = {frames: output_frames(probe, frames) for frames in (97, 203, 318)}
    frames, wide = x.shape[2], out.shape[1]
    off = {size: given - made for size, (made, given) in pairs.items()}
    short = {size: made for size, (made, _) in pairs.items()}
    worst = max(off, key=lambda size: abs(off[size]) / max(short[size], 1))
    evidence = {"feature frames: output frames, returned length": {s: f"{m}, {g}" for s, (m, g) in pairs.items()},
                "in a batch": f"{wide} output frames, returned {returned.tolist()}"}
    longest = int(returned.max())
    if longest > wide or off[worst] > 0:
        yield Finding(
            "length-mismatch",
            "prevents",
            f"The model returns lengths beyond its output: {pairs[worst][1]} for {pairs[worst][0]} frames that came "
            "out "
            f"of {worst}." if off[worst] > 0 else f"It returns a length of {longest} for {wide} output frames.",
            "The lengths are not shortened as the output is (the subsampling is not applied to them, or another one). "
            "CTC then reads frames that do not exist: an error on some devices, numbers without meaning on others.",
            evidence,
            [*([f"{subject.settings.key('model.encoder.conv_mask')}=true: without its masks NeMo's ConvASREncoder leaves the "
                "lengths as they came, and lets padding in"]
               if subject.settings is not None and subject.settings.get("model.encoder.conv_mask") is False else []),
             "return lengths through the same arithmetic as the layers: floor((length + 2 * padding - dilation * "
             "(kernel - 1) - 1) / stride) + 1 for each (recipes.lengths.conv_out_length)"],
            0.98,
            where="encoder",
        )
        return
    lost = -off[worst]
    if lost >= 1:
        share = lost / short[worst]
        yield Finding(
            "length-mismatch",
            "prevents" if share > 0.15 else "warning",
            f"The model returns a length of {pairs[worst][1]} where {pairs[worst][0]} frames come out of {worst} "
            "without "
            "padding.",
            "The returned lengths are shorter than the output: the end of every utterance is left out of loss and "
            "decoding, and targets may not fit any more.",
            evidence,
            ["return lengths through the same arithmetic as the layers (recipes.lengths.conv_out_length)"],
            0.95 if share > 0.05 else 0.7,
            where="encoder",
        )
        return
    # A chain that is right for whole batches may still shorten single lengths otherwise.
    alone = [output_frames_of(probe, int(length)) for length in lengths]
    wrong = [(int(length), int(given), made) for length, given, made in zip(lengths, returned, alone) if given != made]
    if wrong and len(set(returned.tolist())) > 1:
        length, given, made = max(wrong, key=lambda entry: abs(entry[1] - entry[2]))
        near = abs(given - made) <= max(2, 0.02 * made)
        yield Finding(
            "length-mismatch",
            "warning" if near else "prevents",
            f"In a batch of {frames} frames the model returns {given} for an item of {length} frames, of which alone "
            f"{made} come out.",
            "The lengths of shorter items are not those that the layers leave of them.",
            {**evidence, "items: given length, returned, alone": [f"{a}, {b}, {c}" for a, b, c in wrong]},
            ["shorten every item's length as the layers do (recipes.lengths.conv_out_length)"],
            0.6 if near else 0.9,
            where="encoder",
        )


def output_frames_of(probe, frames: int) -> int:
    """Output frames of one item alone."""
    with probe.ready(calibrate=False), torch.no_grad():
        return output_frames(probe, frames)[0]


@check("lengths", faults=("length-ignored",), needs=("model",))
def lengths_are_heeded(subject):
    """Returned lengths depend on those given."""
    probe = subject.probe
    with probe.ready(calibrate=False), torch.no_grad():
        x, _ = probe.made_up_features([320, 320, 320])
        given = torch.tensor([320, 200, 90], device=x.device)
        _, returned = probe.forward(x, given)
    got = returned.tolist()
    if len(set(got)) > 1:
        share = [g / max(got[0], 1) for g in got]
        if abs(share[1] - 0.625) < 0.12 and abs(share[2] - 0.28) < 0.12:
            return
        symptom = f"Lengths of {given.tolist()} frames become {got}, which is not in proportion."
        yield Finding("length-mismatch", "prevents", symptom, "The returned lengths are computed from something else "
                                                              "than "
                      "the lengths given, or in the wrong order.", {"given": given.tolist(), "returned": got},
                      ["return one length for each item, in the order of the batch"], 0.9, where="encoder")
        return
    yield Finding(
        "length-ignored",
        "prevents",
        f"Items of {given.tolist()} frames all get an output length of {got[0]}.",
        "The lengths are ignored: padding counts as speech. CTC spreads the letters of a short utterance over its "
        "padding, and decoding reads it.",
        {"given": given.tolist(), "returned": got},
        ["pass `length` through the encoder and return what is left of it after each layer that shortens time"],
        0.95,
        where="encoder",
    )


@check("lengths", faults=("model-does-not-build",), needs=("model", "manifests"))
def every_length_passes(subject):
    """The longest and the shortest utterance of train pass through the model."""
    probe = subject.probe
    s = subject.settings
    low, high = (s.number(f"model.train_ds.{key}", limit) if s is not None else limit
                 for key, limit in (("min_duration", 0.0), ("max_duration", LONGEST)))
    rows = [row for row in subject.rows.get("train", []) if low <= row["duration"] <= min(high, LONGEST)]
    if not rows:
        raise NotExamined("no utterance of train is between the limits of its length")
    frames_of = getattr(getattr(probe.model.preprocessor, "featurizer", None), "get_seq_len", None)
    middle = sorted(row["duration"] for row in rows)[len(rows) // 2]
    if (error := _fails(probe, min(int(middle * 100), USUAL))) is not None:
        raise NotExamined(f"no usual utterance passes either: {_said(error)}")
    for kind, row in (("longest", max(rows, key=lambda r: r["duration"])),
                      ("shortest", min(rows, key=lambda r: r["duration"]))):
        samples = torch.tensor([int(row["duration"] * probe.sample_rate)])
        frames = int(frames_of(samples)[0]) if frames_of else int(samples[0]) * 100 // probe.sample_rate
        if frames < 1:
            continue
        if (error := _fails(probe, frames)) is not None:
            if _no_memory(error):
                raise NotExamined(f"there is no memory for the {kind} utterance beside what the run holds: {_said(error)}")
            yield Finding(
                "model-does-not-build", "prevents",
                f"The model does not run on the {kind} utterance of train, {row['duration']:.2f} s ({frames} feature "
                f"frames): {_said(error)}",
                "A table of positions, a mask or a buffer of a fixed size is shorter than the utterance."
                if kind == "longest" else "The utterance is shorter than what a kernel or a pooling needs.",
                {"seconds": row["duration"], "feature frames": frames, "error": _said(error)},
                ["make the table as long as the longest utterance needs, or compute positions from the length",
                 f"model.train_ds.max_duration below {row['duration']:.2f}"] if kind == "longest" else
                [f"model.train_ds.min_duration above {row['duration']:.2f}"],
                0.97, where=row["_at"])


def _fails(probe, frames: int) -> Exception | None:
    """The error with which the model does not take one item of so many feature frames."""
    try:
        with probe.ready(calibrate=False), torch.no_grad():
            output_frames(probe, frames)
    except Exception as error:  # anybody's forward
        return error.with_traceback(None)  # whose frames hold tensors
    return None


def _no_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@check("lengths", faults=(), needs=("model", "manifests"))
def real_sound(subject):
    """Features and encoder are probed with utterances of the manifests."""
    made = sum(not item.row for item in subject.probe.items())
    if made:
        raise NotExamined(f"{made} of 4 had to be made-up tones: the manifests have too few utterances of {SHORTEST:g} s or "
                          "more that have a text and can be read")


@check("lengths", faults=("data-target-too-long",), needs=("model", "manifests"))
def targets_fit(subject):
    """Targets fit into the output: T_out >= S + adjacent repeats, with the model's own lengths."""
    from tools.doctor.labels import encode_text

    probe = subject.probe
    with probe.ready(calibrate=False), torch.no_grad():
        rule = length_rule(probe)
        if rule is None:
            raise NotExamined("output lengths follow no rule that could be learned")
        featurize = getattr(getattr(probe.model.preprocessor, "featurizer", None), "get_seq_len", None)
    judged = False
    for role in ("train", "validation"):
        rows = [row for row in subject.rows.get(role, []) if row["text"]]
        need, room, kept = [], [], []
        for row in rows:
            try:
                target = encode_text(probe, row["text"])
            except NotExamined:
                raise
            except Exception:  # characters outside the labels: the data family says so
                continue
            need.append(len(target) + sum(a == b for a, b in zip(target, target[1:])))
            room.append(row["duration"] * probe.sample_rate)
            kept.append(row)
        if not kept:
            continue
        judged = True
        samples = torch.tensor(room).long()
        frames = featurize(samples).tolist() if featurize else (samples * 100 // probe.sample_rate).tolist()
        room = [rule(int(t)) for t in frames]
        rate = sum(frames) / max(sum(row["duration"] for row in kept), 1e-9)
        yield from _too_long(probe, role, kept, need, room, rule, rate)
        tempo = subject.settings.number("model.tempo", 0.0) if subject.settings is not None else 0.0
        if role == "train" and 0 < tempo < 1:
            fast = [rule(max(int(t * (1 - tempo)), 1)) for t in frames]
            yield from _too_fast(subject.settings, tempo, kept, need, room, fast)
    if not judged:
        raise NotExamined("no text of the manifests can be spelt with the labels")


def _too_fast(settings, tempo, rows, need, room, fast):
    """A finding for utterances whose targets fit as they are spoken, and not at the fastest tempo drawn in training."""
    lost = [i for i in range(len(rows)) if fast[i] < need[i] <= room[i]]
    if not lost:
        return
    share, key = len(lost) / len(rows), settings.key("model.tempo")
    yield Finding(
        "data-target-too-long",
        "warning" if share > 0.02 else "note",
        f"{len(lost)} of {len(rows)} utterances of train have targets that fit as they are spoken, and not into what "
        f"is left of them at the fastest tempo of training ({key}={tempo:g}). First {rows[lost[0]]['_at']}: "
        f"{need[lost[0]]} needed, {fast[lost[0]]} frames.",
        "Faster speech has fewer frames for the same letters. In the batches in which they do not fit, nothing is "
        "learned from these utterances.",
        {"utterances": len(lost), "of": len(rows), "share": round(share, 4), "tempo": tempo},
        [f"a smaller {key}, or less subsampling"],
        0.9,
        where=key,
    )


def _too_long(probe, role, rows, need, room, rule, rate):
    bad = [i for i in range(len(rows)) if need[i] > room[i]]
    tight = sum(n > 0.8 * r for n, r in zip(need, room))
    fill = sorted(n / max(r, 1) for n, r in zip(need, room))
    plot = Plot("Targets and room for them", "target symbols and repeats / output frames", "share of utterances below",
                {role: (fill, [(i + 1) / len(fill) for i in range(len(fill))])}, "over 1 does not fit")
    share = len(bad) / len(rows)
    middle = fill[len(fill) // 2]
    if not bad and middle < 0.85:
        return
    worst = sorted(bad, key=lambda i: room[i] - need[i])[:5]
    if bad:
        symptom = (f"{len(bad)} of {len(rows)} utterances of {role} have targets that do not fit into the output: "
                   "their "
                   f"CTC loss is infinite. First {rows[bad[0]]['_at']}: {need[bad[0]]} needed, {room[bad[0]]} frames.")
    else:
        symptom = f"Targets of {role} fill {middle:.0%} of the output frames (median): hardly any room for blanks."
    slow = rate < SLOW_FRONT_END and share > 0.01
    front_end = [f"model.preprocessor.window_stride=0.01 (seconds; the front end makes {rate:.3g} frames a second, "
                 "usual are 100)"] if slow else []
    yield Finding(
        "data-target-too-long",
        "prevents" if role == "train" and (share >= MANY or middle >= 0.95) else "warning" if share > 0.002 or not bad
        else "note",
        symptom,
        f"The model puts out one frame for {rule.stride} feature frames, {rate / max(rule.stride, 1):.3g} a second; "
        "CTC needs one for each target symbol and one between equal neighbours. NeMo sets such a loss to 0 without a "
        "word: nothing is learned from these utterances.",
        {"utterances": len(bad), "of": len(rows), "share": round(share, 4), "over 80 % full": tight,
         "subsampling": rule.stride, "feature frames a second": round(rate, 1), "median fill": round(middle, 3),
         "worst": [f"{rows[i]['_at']}: {need[i]} symbols, {room[i]} frames, {rows[i]['duration']:.2f} "
                   "s" for i in worst]},
        [*front_end, "subsample less (model.encoder.subsampling_factor or the strides)" if share > 0.01 or not bad else
         "drop them from the manifest (their text is likely wrong)",
         "or use longer sub-word tokens (a larger BPE vocabulary makes shorter targets)",
         "or look at the texts of those named: so many letters a second are often another utterance's text"],
        0.97 if bad else 0.7,
        where="model.preprocessor.window_stride" if slow else rows[bad[0]]["_at"] if bad else "encoder",
        plots=[plot],
    )
