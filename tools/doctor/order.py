"""The order in which training hears its utterances. From the configuration and the manifest; no torch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tools.doctor.finding import Finding
from tools.doctor.registry import NotExamined, check

SORTED = 0.5  # share of the utterances whose follower is of the same speaker, where it would be half of that by chance


@check("order", faults=("data-order",), needs=("config", "manifests"))
def order_of_train(subject):
    """Training hears the utterances in another order in each epoch, or at least not speaker by speaker."""
    s, rows = subject.settings, subject.rows.get("train", [])
    value = s.get("model.train_ds.shuffle")
    if value is None or len(rows) < 20:
        raise NotExamined("nothing says whether train is shuffled" if value is None else "too few utterances")
    if s.get("model.train_ds.tarred_audio_filepaths"):
        raise NotExamined("shards are read in the order in which they were written")
    if str(value).lower() not in ("false", "0"):
        return
    speakers = [str(row.get("speaker") or Path(row["audio_filepath"]).parent) for row in rows]
    same = sum(a == b for a, b in zip(speakers, speakers[1:])) / (len(rows) - 1)
    chance = sum((count / len(rows)) ** 2 for count in Counter(speakers).values())
    in_blocks = same > SORTED and chance < same / 2
    key = s.key("model.train_ds.shuffle")
    yield Finding(
        "data-order", "warning" if in_blocks else "note",
        f"{key}=false: each epoch hears the utterances in the order of the manifest"
        + (f", in which {same:.0%} are followed by one of the same speaker or folder, {chance:.0%} by chance." if in_blocks
           else "."),
        "Neighbouring batches are alike, so that each step goes towards one speaker and the next takes it back; batch "
        "normalisation sees the statistics of one voice." if in_blocks else
        "The same batches in the same order each time are learned as such.",
        {"followed by the same": round(same, 3), "by chance": round(chance, 3), "speakers or folders": len(set(speakers))},
        [f"{key}=true"], 0.85, where=key)
