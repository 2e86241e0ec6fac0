"""Command lines of `key=value` overrides, checked within a second: before torch and NeMo are imported.

An entry point declares its options as a dataclass; the same spelling as Hydra's, without composing files.
"""

from __future__ import annotations

import difflib
import sys
from dataclasses import field, fields
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipes.pretrained import FOLDERS, pretrained_path

EXIT_FAILED, EXIT_USAGE = 1, 2
PRECISIONS = ("32", "bf16-mixed")  # of decoding; Lightning's names


class UsageError(ValueError):
    """A command line that cannot be run. The message is one line."""


def option(help: str, default: Any) -> Any:
    """A field of an options dataclass with its default and its line in --help."""
    return field(default=default, metadata={"help": help})


def required(help: str) -> Any:
    """A mandatory field."""
    return field(default="???", metadata={"help": help})


def parse(options: type, arguments: list[str], usage: str):
    """An instance of the dataclass `options` from `key=value` arguments.

    `--help` prints `usage` and the options and ends the program. Raises UsageError, in one line, at an argument
    that is not `key=value`, an unknown key (with the nearest valid one), a value of the wrong type, or a
    mandatory key that is missing.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        print(help_text(options, usage))
        raise SystemExit(0)
    names = [f.name for f in fields(options)]
    schema = OmegaConf.structured(options)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        key = key.lstrip("-")
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
        if not equals or argument.startswith("-"):
            example = f"{near[0] if near else names[0]}={value or 'VALUE'}"
            raise UsageError(f"argument {argument!r} is not KEY=VALUE; write for example {example}")
        if key not in names:
            hint = f"did you mean {near[0]}?" if near else f"valid: {', '.join(names)}"
            raise UsageError(f"unknown key {key!r}; {hint}")
        try:
            given = OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}={_quote(value)}"]))
            schema = OmegaConf.merge(schema, given)
        except (OmegaConfBaseException, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"{key}={value}: {reason}") from None
        except Exception as error:  # yaml's own errors, several kinds and several lines
            raise UsageError(f"{key}={value}: cannot be read ({str(error).splitlines()[0]})") from None
    missing = sorted(OmegaConf.missing_keys(schema), key=names.index)
    if missing:
        raise UsageError(f"missing mandatory option: give {missing[0]}=...; --help lists the options")
    return OmegaConf.to_object(schema)


def _quote(value: str) -> str:
    """A path may hold what YAML gives a meaning to, such as `: ` or ` #`: only lists and null are YAML here."""
    if value.startswith("[") or value in ("null", ""):
        return value or '""'
    return "'" + value.replace("'", "''") + "'"


def help_text(options: type, usage: str) -> str:
    """The usage and one line an option: name, default, meaning."""
    lines = [usage.strip(), "", "options, each as KEY=VALUE:"]
    width = max(len(f.name) for f in fields(options))
    for f in fields(options):
        default = "mandatory" if f.default == "???" else f"default {'none' if f.default is None else f.default}"
        lines.append(f"  {f.name:<{width}}  {f.metadata['help']} ({default})")
    return "\n".join(lines)


def path_list(key: str, value: Any) -> list[Path]:
    """One path or a list of paths, `~` expanded. Raises UsageError where it is neither, or empty."""
    values = [value] if isinstance(value, (str, Path)) else value
    if not isinstance(values, (list, tuple)) or not values or not all(str(v).strip() for v in values):
        raise UsageError(f"{key}={value}: give one path or a list, {key}=[a,b]")
    return [Path(str(v)).expanduser() for v in values]


def existing_file(key: str, value: Any, what: str) -> Path:
    """The path of a file that is there. Raises UsageError naming it otherwise."""
    path = Path(str(value)).expanduser()
    if not path.is_file():
        reason = "is a folder" if path.is_dir() else "no such file"
        hint = f"; for several write {key}=[a,b]" if "," in str(value) and not path.exists() else ""
        raise UsageError(f"{key}={value}: {reason}; give {what}{hint}")
    return path


def existing_model(value: Any) -> Path:
    """The path of a saved model, not opened; the name of a recipe is its pretrained one. Raises UsageError."""
    kinds = "a .nemo, or a Lightning .ckpt of a NeMo model, or the name of a recipe with pretrained weights"
    if value in FOLDERS and not Path(value).exists():
        path = pretrained_path(value)
        if not path.is_file():
            there = [name for name in FOLDERS if pretrained_path(name).is_file()]
            raise UsageError(f"model={value}: no pretrained weights of it here; there are {', '.join(there) or 'none'}")
        return path
    path = existing_file("model", value, kinds)
    if path.suffix not in (".nemo", ".ckpt"):
        raise UsageError(f"model={value}: {path.suffix or 'no suffix'} is no known kind; give {kinds}")
    return path


def positive(key: str, value: float | None) -> None:
    """Raises UsageError where a number is given and is not above 0."""
    if value is not None and not value > 0:
        raise UsageError(f"{key}={value}: must be above 0")


def known(key: str, value: str, valid: tuple[str, ...]) -> None:
    """Raises UsageError where the value is none of the valid ones."""
    if value not in valid:
        raise UsageError(f"{key}={value}: use one of {', '.join(valid)}")


def fail(program: str, error: Exception | str, status: int) -> NoReturn:
    """One line to stderr and the end of the program."""
    print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(status)
