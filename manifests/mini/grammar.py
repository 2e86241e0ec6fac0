"""The sentence grammar of the embedded corpus: reads the rule files beside this module and expands them at random.

A rule file (``grammar.txt``, ``newwords.txt``) holds classes ``NAME = a | b | c`` and sentence frames ``* ...``, or
``+ ...`` for train only, with ``{NAME}`` and ``(x|y|)``; its head explains the notation. Expansion uses nothing but the
``random.Random`` passed in.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
_AN = re.compile(r"\ba (?=[aeiou])")
_CLASS = re.compile(r"^([A-Z]+) = (.*)$")
_TOKEN = re.compile(r"\{([A-Z]+)\}|\(([^()]*)\)|([^{}()]+)|(.)")


class GrammarError(ValueError):
    """A rule file that cannot be used; the message is one line with file, line and value."""


class Grammar:
    """Classes and sentence frames; ``expand`` turns a frame into a spoken line (words, commas, question mark).

    ``frames``, ``train_only``: the frames as they are written, in the order of the files; those of ``train_only``
    make train sentences and no others. Raises GrammarError for a bad rule file.
    """

    def __init__(self, *names: str):
        self.classes: dict[str, list[str]] = {}
        self.frames: list[str] = []
        self.train_only: list[str] = []
        for name in names:
            self._read(HERE / name)
        # A frame or alternative becomes a list of parts: words as they stand, or a list of alternatives (their parts).
        self._compiled_classes: dict[str, list] = {name: [] for name in self.classes}
        for name, alternatives in self.classes.items():
            self._compiled_classes[name] += [self._compile(text) for text in alternatives]
        self._compiled = {frame: self._compile(frame) for frame in self.frames + self.train_only}

    def _read(self, path: Path) -> None:
        current = None
        for number, line in enumerate(path.read_text(encoding="ascii").splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                current = None
            elif line.startswith(("* ", "+ ")):
                current = self.frames if line[0] == "*" else self.train_only
                current.append(line[2:].strip())
            elif line[0].isspace() and (current is self.frames or current is self.train_only):
                current[-1] += " " + line.strip()
            elif line[0].isspace() and current is not None:
                current += _alternatives(line.strip().strip("|"))
            elif match := _CLASS.match(line):
                if match[1] in self.classes:
                    raise GrammarError(f"{path.name}:{number}: class {match[1]} is defined twice; keep one of them")
                current = self.classes[match[1]] = _alternatives(match[2])
            else:
                raise GrammarError(f"{path.name}:{number}: neither a class, a frame nor a comment: {line[:60]!r}")

    def _compile(self, text: str) -> list:
        parts: list = []
        for match in _TOKEN.finditer(text):
            if match[1]:
                if match[1] not in self.classes:
                    raise GrammarError(f"class {{{match[1]}}} in {text[:60]!r} is not defined in the rule files")
                parts.append(self._compiled_classes[match[1]])
            elif match[2] is not None:
                parts.append([self._compile(alternative) for alternative in match[2].split("|")])
            elif match[3]:
                parts.append(match[3])
            else:
                raise GrammarError(f"stray {match[4]!r} in {text[:60]!r}: brackets must be closed and not nested")
        return parts

    def vocabulary(self, train_only: bool = True) -> set[str]:
        """Every word that a sentence of this grammar can hold, "an" included; or of the frames of all subsets alone."""
        frames = self.frames + (self.train_only if train_only else [])
        words, seen, todo = {"an"}, set(), [self._compiled[frame] for frame in frames]
        while todo:
            for part in todo.pop():
                if isinstance(part, str):
                    words.update(words_of(re.sub("[A-Z]+", " ", part)))
                elif id(part) not in seen:
                    seen.add(id(part))
                    todo += part
        return words

    def expand(self, frame: str, rng: random.Random) -> str:
        """One spoken line of ``frame``: single spaces, no space before punctuation, "an" before a vowel."""
        out: list[str] = []
        _expand(self._compiled[frame], rng.random, out)
        spoken = " ".join("".join(out).split()).replace(" ,", ",").replace(" ?", "?")
        return _AN.sub("an ", spoken)


def _expand(parts: list, draw, out: list[str]) -> None:
    for part in parts:
        if isinstance(part, str):
            out.append(part)
        else:
            _expand(part[int(draw() * len(part))], draw, out)


def _alternatives(text: str) -> list[str]:
    """Split at the bars that are not inside round brackets."""
    return [alternative.strip() for alternative in re.split(r"\|(?![^()]*\))", text)]


def words_of(spoken: str) -> list[str]:
    """The transcript's words of a spoken line: lower case, without the punctuation."""
    return spoken.replace(",", " ").replace("?", " ").lower().split()
