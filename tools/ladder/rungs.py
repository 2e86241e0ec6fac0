"""The rungs of the ladder: what each trains on, the error to reach there, and where it gives up. Imports nothing heavy.

The choice of utterances depends on their ids alone, not on the order of the manifest, the machine or a seed, so the
same corpus gives the same rungs to everyone.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from manifests.shards_format import is_sharded
from recipes.config import ConfigError

SAMPLE = 64  # utterances on which the error on what is trained on is measured
SHORTEST, LONGEST = 2.0, 8.0  # seconds: long enough to be speech, short enough for a quick answer


@dataclass(frozen=True)
class Rung:
    """One rung.

    name: as it is asked for on the command line.
    target: character error rate to reach, on a sample of what is trained on; of the last rung on dev.
    utterances, seconds: how much of the manifest, at most; None where that does not limit it.
    epochs, minutes: where it gives up, passes over its data and minutes of training; None is the recipe's own length.
    short: of utterances of 2 to 8 s, where there are enough such.
    regularised: with the recipe's dropout and masks.
    batches: a pass has at least so many; the recipe's batch is made smaller for that, never larger.
    validations: how often in its epochs the error is measured; the steps to the target are known to that precision.
    """

    name: str
    target: float
    utterances: int | None = None
    seconds: float | None = None
    epochs: float | None = None
    minutes: float | None = None
    short: bool = False
    regularised: bool = True
    batches: int = 1
    validations: int = 50

    @property
    def whole(self) -> bool:
        """Whether this is the recipe as it is, on all of its data."""
        return self.utterances is None and self.seconds is None


# Eight batches of eight, learned by heart like the first rung but by the training loop: sampler, buckets, warm-up and
# decay, BatchNorm over batches that change. One letter in twenty: the words are there, and only who knows these 64
# sentences by heart gets so far with so little. The last few errors would cost as many steps again and say no more.
# 250 passes are 2000 steps, five to ten times what one batch takes.
HEART = Rung("64", target=0.05, utterances=64, epochs=250, minutes=60, short=True, regularised=False, batches=8)

# Too much to be known by heart before sounds are learned. Blanks, one letter and words that are frequent everywhere
# leave an error above 60 %, a model that spells by sound but has heard too little is at 30 to 50 %; one letter in five
# is out of reach for both. Measured in evaluation mode on what is trained on, so dropout and masks do not count.
# 100 passes over 1 h are 5,625 steps of 64 s.
HOUR = Rung("1h", target=0.20, seconds=3600.0, epochs=100, minutes=150)

# The recipe as it is, with its own number of passes. The target is on dev, the error that counts. 30 % is what a small
# model is asked to reach on two cores from 8 h of read speech; give another corpus its own by --target all=0.1.
ALL = Rung("all", target=0.30)

ABOVE_BATCH = (HEART, HOUR, ALL)
NAMES = ("batch", *(rung.name for rung in ABOVE_BATCH))


def up_to(last: str, changes: dict[str, dict[str, float]] | None = None) -> list[Rung]:
    """The rungs above `batch` up to `last`, lowest first; `changes` is rung to field to value."""
    rungs = [replace(rung, **(changes or {}).get(rung.name, {})) for rung in ABOVE_BATCH]
    return rungs[: NAMES.index(last)]


def identity(row: dict) -> str:
    """What names an utterance wherever its audio lies: its id, else the file's name and where in it it begins."""
    return str(row.get("utterance") or f"{Path(row['audio_filepath']).stem}@{row.get('offset', 0)}")


def usable(rows: list[dict], shortest: float, longest: float) -> list[dict]:
    """The rows that training would take, by duration in seconds. Raises ConfigError for none, and for shards."""
    if any(is_sharded(row) for row in rows):
        raise ConfigError(
            "the ladder takes single utterances out of the manifest, and this one is of shards: give the manifest that "
            "they were made from as corpus.train"
        )
    kept = [row for row in rows if shortest <= row["duration"] <= longest]
    if not kept:
        raise ConfigError(f"no utterance of the training manifest is between {shortest} and {longest} s")
    return kept


def spread(rows: list[dict]) -> list[dict]:
    """The rows in an order of which every beginning is spread over the speakers: one of each, then a second of each.

    Within a speaker, and among the speakers, the order is by a hash of the ids.
    """
    speakers: dict[str, list[dict]] = {}
    for row in sorted(rows, key=_lot):
        speakers.setdefault(str(row.get("speaker", "")), []).append(row)
    turns = zip_longest(*sorted(speakers.values(), key=lambda queue: _lot(queue[0])))
    return [row for turn in turns for row in turn if row is not None]


def _lot(row: dict) -> bytes:
    return hashlib.sha256(identity(row).encode()).digest()


def subset(rung: Rung, rows: list[dict]) -> list[dict]:
    """What a rung trains on: of `rows`, spread over the speakers, as many utterances or seconds as it takes."""
    if rung.short:
        short = [row for row in rows if SHORTEST <= row["duration"] <= LONGEST]
        if len(short) >= (rung.utterances or 0):
            rows = short
        else:
            rows = sorted(rows, key=lambda row: (row["duration"], identity(row)))[: rung.utterances]
    chosen, seconds = [], 0.0
    for row in spread(rows):
        if len(chosen) == rung.utterances or (rung.seconds is not None and seconds >= rung.seconds):
            break
        chosen.append(row)
        seconds += row["duration"]
    return chosen


def quote(value) -> str:
    """A value as Hydra's grammar reads it back unchanged, whatever characters it has."""
    from hydra.core.override_parser.types import Quote, QuotedString

    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    return QuotedString(text=str(value), quote=Quote.single).with_quotes()


def settings(rung: Rung, cfg, seconds: float) -> dict[str, object]:
    """What a rung changes in the composed recipe `cfg`, Hydra key to value, for `seconds` of audio a pass.

    Nothing but where it trains, when it ends and, on the rung that is learned by heart, dropout and masks.
    """
    if rung.whole:
        return {}
    changed: dict[str, object] = {
        "training.epochs": rung.epochs or cfg.training.epochs,
        "training.validations": rung.validations,
        "training.global_batch_seconds": min(cfg.training.global_batch_seconds, round(seconds / rung.batches, 3)),
        "trainer.max_steps": -1,  # epochs and the target say when it ends, whatever the recipe does
        "trainer.val_check_interval": None,
        "exp_manager.create_early_stopping_callback": True,
        "exp_manager.early_stopping_callback_params.monitor": "val_cer",
        "exp_manager.early_stopping_callback_params.mode": "min",
        # Lightning stops below the threshold, not at it.
        "exp_manager.early_stopping_callback_params.stopping_threshold": rung.target + 1e-6,
        # Half of its length without an error any lower: the rest would not bring it.
        "exp_manager.early_stopping_callback_params.patience": max(rung.validations // 2, 2),
        "exp_manager.early_stopping_callback_params.min_delta": 0.0,
        "exp_manager.early_stopping_callback_params.verbose": False,
        "exp_manager.checkpoint_callback_params.monitor": "val_cer",
        "exp_manager.checkpoint_callback_params.save_top_k": 1,
    }
    if not rung.regularised:
        changed |= {"model.spec_augment": None, "model.preprocessor.dither": 0.0}
        changed |= {"model.tempo": 0.0, "model.consistency_weight": 0.0, "model.noise_and_rooms": None}
        if "bpe_dropout" in cfg.model:
            changed["model.bpe_dropout"] = 0.0
        changed |= {f"model.encoder.{key}": 0.0 for key in cfg.model.encoder if str(key).startswith("dropout")}
        changed["init_from"] = None
    return changed


def duration(minutes: float) -> str:
    """DD:HH:MM:SS, as Lightning's `max_time` takes it."""
    seconds = round(minutes * 60)
    return f"{seconds // 86400:02d}:{seconds // 3600 % 24:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def key_of(override: str) -> str:
    """The key that a Hydra override sets: `a.b` of `++a.b=3`."""
    return override.split("=", 1)[0].lstrip("+~").strip()


def override_lines(given: list[str], changed: dict[str, object]) -> list[str]:
    """The user's overrides and the rung's (`++`, which also adds); where both set a key, the rung's alone."""
    kept = [line for line in given if key_of(line) not in changed]
    return kept + [f"++{key}={quote(value)}" for key, value in changed.items()]
