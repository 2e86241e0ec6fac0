"""Which manifests a data section of NeMo names, `input_cfg` of lhotse included, and what its loader makes of their lines:
fields under other names, texts in files of their own, audio in tars. No torch.
"""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from manifests.schema import Line, check_row
from manifests.shards_format import is_sharded

NOT_MANIFESTS = ("shar_path", "cuts_path")  # lhotse's own formats, which the doctor does not read
SHARDED = re.compile(r"(^|/)(tarred_audio_manifest|sharded_manifests/manifest_\d+)\.json$")  # as NeMo tells them


class Source(NamedTuple):
    """A manifest, and how its lines are read.

    reader: "nemo", "lhotse", or "recipe" for ours, which take them as they are; tarred: whether the audio is in tars.
    """

    path: str = ""
    reader: str = "nemo"
    text_field: str = "text"
    lang_field: str = "lang"
    tarred: bool = False


def sources(section: Any, reader: str = "nemo") -> tuple[list[Source], list[str]]:
    """(the manifests that a data section names, what it names beside them that is not read here)."""
    found: list[Source] = []
    other: list[str] = []
    if isinstance(section, DictConfig):
        _walk(section, options(section, reader), found, other)
    return found, other


def options(section: Any, reader: str) -> Source:
    """What a section says of all of its manifests, without a path."""
    return _below(section, Source(reader=reader)) if isinstance(section, DictConfig) else Source(reader=reader)


def _walk(node: DictConfig, above: Source, found: list[Source], other: list[str], depth: int = 0) -> None:
    """One entry and those below it; what an entry does not say for itself it has from above."""
    source = _below(node, above)
    manifests = paths(_at(node, "manifest_filepath"))
    groups = _at(node, "input_cfg")
    # NeMo's loader without lhotse reads no input_cfg.
    if groups is not None and (source.reader == "lhotse" or not manifests) and depth < 10:
        for entry in _entries(groups, other):
            _walk(entry, source, found, other, depth + 1)
        return
    foreign = [f"{key}={value}" for key in NOT_MANIFESTS if (value := _at(node, key)) is not None]
    kind = str(_at(node, "type") or "nemo") if depth else "nemo"
    if foreign and source.reader == "lhotse" or not kind.startswith(("nemo", "multi_")):
        other += [part[:120] for part in foreign] or [f"type {kind}"]
        return
    for path in manifests:
        # Elsewhere, a shell command, or packed: lhotse opens these.
        if "://" in path or path.startswith("pipe:") or source.reader == "lhotse" and path.endswith(".gz"):
            other.append(path)
        else:
            found.append(source._replace(path=path))


def _below(node: DictConfig, above: Source) -> Source:
    tars = any(_at(node, key) for key in ("tarred_audio_filepaths", "tarred_audio_filepath", "is_tarred"))
    return above._replace(text_field=str(_at(node, "text_field") or above.text_field),
                          lang_field=str(_at(node, "lang_field") or above.lang_field), tarred=bool(tars) or above.tarred)


def _entries(groups: Any, other: list[str]) -> list[DictConfig]:
    """The entries of an `input_cfg`: a list, or the path of a YAML that holds one."""
    if isinstance(groups, str):
        try:
            groups = OmegaConf.load(groups)
        except Exception:  # not there, or no YAML: yaml and omegaconf have no common kind
            other.append(f"input_cfg={groups}, which cannot be read")
            return []
    if isinstance(groups, DictConfig):
        groups = [groups]
    return [entry for entry in groups if isinstance(entry, DictConfig)] if isinstance(groups, (list, ListConfig)) else []


def _at(node: DictConfig, key: str) -> Any:
    """Value of a key; None where it is not there, missing, or does not resolve."""
    try:
        return OmegaConf.select(node, key, throw_on_missing=False)
    except OmegaConfBaseException:
        return None


def paths(value: Any) -> list[str]:
    """Paths in a value of `manifest_filepath`: one, several with commas, a list, lists of [path, weight]."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, (list, ListConfig)):
        return [path for item in value for path in paths(item)]
    return []


# ---- lines -----------------------------------------------------------------------------------------------------


def adapted(line: Line, source: Source) -> Line:
    """A line with its row as the loader understands it, and what is wrong with that."""
    if line.row is None or source.reader == "recipe":
        return line
    row = _of_lhotse(line.row, source) if source.reader == "lhotse" else _of_nemo(line.row)
    if _in_tar(row, source):
        row = {**row, "_tarred": True}
    return line if row is line.row else Line(line.number, row, tuple(check_row(row)))


def _of_lhotse(row: dict, source: Source) -> dict:
    for name, field in (("text", source.text_field), ("lang", source.lang_field)):
        if field != name:  # what stands under the usual name is not read then
            row = {key: value for key, value in row.items() if key != name}
            if field in row:
                row[name] = row[field]
    return row


def _of_nemo(row: dict) -> dict:
    """As in nemo/collections/common/parts/preprocessing/manifest.py."""
    more: dict[str, Any] = {}
    if "audio_filename" in row:
        more["audio_filepath"] = row["audio_filename"]
    elif "audio_filepath" not in row and "context" in row:
        more["audio_filepath"] = row["context"]
    if "duration" not in row and "context_duration" in row:
        more["duration"] = row["context_duration"]
    if "text" not in row:
        if isinstance(file := row.get("text_filepath"), str):
            more |= _text_of(file)
        elif "normalized_text" in row:
            more["text"] = row["normalized_text"]
    return {**row, **more} if more else row


def _text_of(file: str) -> dict[str, str]:
    try:
        with open(file, encoding="utf-8") as opened:
            return {"text": opened.read().replace("\n", "")}
    except (OSError, ValueError):
        return {}  # told as a text that is not there


def _in_tar(row: dict, source: Source) -> bool:
    audio = row.get("audio_filepath")
    if not isinstance(audio, str) or is_sharded(row):
        return False
    return source.tarred or "/" not in audio and SHARDED.search(source.path.replace(os.sep, "/")) is not None
