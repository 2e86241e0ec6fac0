"""Names the utterances of a batch: from ids in it, else by finding its texts in the train manifests.

NeMo's own batches carry no ids, so a row is looked up by its targets (the same text, the nearest duration). Imports
no torch.
"""

from __future__ import annotations

from pathlib import Path

from manifests.schema import ManifestError, scan_manifest


def of_batch(batch, model, call=None, manifests: list[str] = (), limit: int = 200_000) -> list[str]:
    """One name a row: an id, a file's name, its text in quotes, or `row k` where nothing is known.

    Args:
        batch: as `training_step` got it.
        model: for its labels or tokenizer, and its sample rate.
        call: listen.Call of this batch, for the targets.
        manifests: to look texts up in; at most `limit` lines are read.
    """
    if ids := _ids(batch):
        return ids
    rows = len(call.input_lengths) // views(batch, len(call.input_lengths)) if call is not None else 0
    texts = target_texts(model, call)[:rows] if call is not None else []
    if not texts:
        return [f"row {row}" for row in range(rows)]
    seconds = _seconds(batch, model)
    found: dict[int, tuple[float, str]] = {}
    wanted: dict[str, list[int]] = {}
    for row, text in enumerate(texts):
        wanted.setdefault(_plain(text), []).append(row)
    for path in manifests:
        try:
            for count, line in enumerate(scan_manifest(path)):
                if count > limit:
                    break
                for row in wanted.get(_plain(str((line.row or {}).get("text", ""))), ()):
                    name = str(line.row.get("utterance") or Path(str(line.row.get("audio_filepath", ""))).stem)
                    off = abs(float(line.row.get("duration", 0) or 0) - seconds[row]) if row < len(seconds) else 0.0
                    if row not in found or off < found[row][0]:
                        found[row] = (off, name)
        except (ManifestError, OSError, TypeError, ValueError):
            continue
    return [found[row][1] if row in found else f"{text[:60]!r}" for row, text in enumerate(texts)]


def _ids(batch) -> list[str]:
    """Ids that travel with the batch: a list of texts in it, or cuts."""
    parts = list(batch.values()) if isinstance(batch, dict) else list(batch) if isinstance(batch, (list, tuple)) else []
    for part in parts:
        if isinstance(part, (list, tuple)) and part:
            if all(isinstance(item, str) for item in part):
                return list(part)
            if all(hasattr(item, "id") and hasattr(item, "duration") for item in part):
                return [str(item.id) for item in part]
        if type(part).__name__ == "CutSet":
            return [str(cut.id) for cut in part]
        nested = _ids(part) if isinstance(part, (list, tuple)) else []
        if nested:
            return nested
    return []


def views(batch, count: int) -> int:
    """How many times the loss saw each utterance of a batch: a step may train on several views, one behind the other.

    `count`: utterances of the loss. 1 where it cannot be told.
    """
    first = batch[0] if isinstance(batch, (list, tuple)) and batch else None
    rows = len(first) if getattr(first, "ndim", 0) >= 2 else 0
    return count // rows if rows and count % rows == 0 else 1


def target_texts(model, call) -> list[str]:
    """The texts that the targets of a call spell; empty where the model has neither labels nor a tokenizer."""
    spell = speller(model, call.log_probs.shape[-1])
    if spell is None:
        return []
    rows, lengths = call.padded_targets().tolist(), call.target_lengths.tolist()
    return [spell(row[:length]) for row, length in zip(rows, lengths)]


def speller(model, size: int):
    """Function from a list of label indices to text, or None where nothing says what they mean."""
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is not None and hasattr(tokenizer, "ids_to_text"):
        return lambda ids: tokenizer.ids_to_text([int(i) for i in ids])
    labels = labels_of(model)
    if not labels or len(labels) > size:
        return None
    return lambda ids: "".join(str(labels[i]) if 0 <= i < len(labels) else "?" for i in ids)


def labels_of(model) -> list[str]:
    """Labels of a character model, empty where there are none."""
    decoder = getattr(model, "decoder", None)
    for holder, name in ((decoder, "vocabulary"), (model, "labels"), (model, "vocabulary")):
        value = getattr(holder, name, None)
        if value is not None and not callable(value) and len(value):
            return [str(label) for label in value]
    return []


def rate_of(model) -> int:
    """Samples a second of the audio that the model takes."""
    return int(getattr(getattr(model, "preprocessor", None), "_sample_rate", None) or 16000)


def frame_rate_of(model) -> float:
    """Feature frames a second; 100 where nothing says."""
    section = getattr(getattr(model, "_cfg", None), "preprocessor", None)
    stride = section.get("window_stride") if hasattr(section, "get") else None
    return 1 / stride if isinstance(stride, (int, float)) and stride > 0 else 100.0


def note_infeasible(trace, recent, need, room, names: list[str]) -> None:
    """Counts rows of a batch that need more frames than there are, each utterance once; keeps the first twenty.

    Args:
        trace: trace.Trace to write to.
        recent: names counted lately (a deque).
        need, room: frames (B).
        names: of the rows, [] where they are not asked for any more.
    """
    for row in (need > room).nonzero().flatten().tolist():
        name = names[row] if row < len(names) else f"step {trace.last_step} row {row}"
        if name not in recent:
            recent.append(name)
            trace.infeasible_seen += 1
            if len(trace.infeasible) < 20:
                trace.infeasible[name] = (int(need[row]), int(room[row]))


def _seconds(batch, model) -> list[float]:
    rate = rate_of(model)
    lengths = batch[1] if isinstance(batch, (list, tuple)) and len(batch) > 1 else None
    return [n / rate for n in lengths.tolist()] if hasattr(lengths, "tolist") else []


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
