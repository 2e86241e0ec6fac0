"""Curves that were only printed: Lightning's progress bars, lines that name a loss, NeMo's hypotheses. Standard library
only."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from tools.doctor.trace import Points

FEWEST = 4  # losses without a step that make a curve: a configuration printed to the log has one or two
VALIDATED = ("val", "dev", "wer", "cer")  # how the names of what only a validation measures begin
NEMO = re.compile(r"\[NeMo [^\]]*\]\s*")  # its ends in a file's name and line, as "wer:318"
# tqdm's "Epoch 5:  45%|###   | 37/81 [00:18<00:22, v_num=0, train_loss=nan.0]", and rich's, without brackets.
BAR = re.compile(r"\bEpoch (\d+)(?:/\d+)?:?\s.*?(\d+)/(\d+|\?|--)\s+(?:\[|\d+:\d\d)(.*)")
STEP = re.compile(r"\b(?:global[_ ])?(?:step|iter(?:ation)?)s?\b['\"]?\s*[:=#]?\s*\[?(\d+)", re.IGNORECASE)
EPOCH = re.compile(r"\bepoch\b['\"]?\s*[:=#]?\s*\[?(\d+)", re.IGNORECASE)
PAIR = re.compile(
    r"(?<![\w/.-])((?:(?:train(?:ing)?|val(?:id(?:ation)?)?|dev|test)\s+)?[a-z][\w/.]*)['\"]?(?:\s*[=:]\s*|\s+)"
    r"(?:tensor\()?([-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|\.\d+|nan(?:\.0*)?|inf(?:\.0*)?))"
    r"(?=[\s,;)\]}|'\"]|$)", re.IGNORECASE)
REACHED = re.compile(r"'([\w/]+)' reached (\S+)")  # Lightning's "Epoch 3, global step 324: 'val_wer' reached 0.9 ..."
PREDICTED = re.compile(r"WER predicted:(.*)|^predicted\s*:(.*)")


@dataclass
class Printed:
    """What text logs say of a run's curve, oldest log first.

    Attributes:
        accumulated: batches that make a step.
        losses: whether they are wanted; hypotheses are in any case.
        columns: name -> points, as a CSV would have them.
        places: step -> where the log has it, in words.
        hypotheses: that NeMo wrote beside their references.
        placed: whether the steps are the trainer's; else the lines were counted.
    """

    accumulated: int = 1
    losses: bool = True
    columns: dict[str, Points] = field(default_factory=dict)
    places: dict[int, str] = field(default_factory=dict)
    hypotheses: list[str] = field(default_factory=list)
    placed: bool = True
    _loose: list[tuple[dict[str, float], str]] = field(default_factory=list)  # losses without a step

    def read(self, lines: Iterable[str]) -> None:
        """Takes one log's lines; a carriage return ends one."""
        epoch = begin = last = 0  # batches before this epoch, for bars that do not know how many it has
        for line in lines:
            if match := PREDICTED.search(NEMO.sub("", line) if "predicted" in line else ""):
                self.hypotheses.append((match[1] or match[2] or "").strip())
            elif not self.losses:
                continue
            elif match := BAR.search(line) if "Epoch" in line else None:
                if int(match[1]) != epoch:
                    epoch, begin = int(match[1]), last
                last = self._bar(epoch, int(match[2]), match[3], begin, match[4])
            elif "loss" in line.lower() or "' reached " in line:
                self._line(NEMO.sub("", line))

    def close(self) -> None:
        """Counts the lines where no step was named."""
        if len(self._loose) >= FEWEST and not any("loss" in name for name in self.columns):
            self.placed = False
            for at, (values, place) in enumerate(self._loose, 1):
                self._add(at, values, place or f"line {at} of those with a loss")

    def _bar(self, epoch: int, batch: int, of: str, begin: int, rest: str) -> int:
        """One state of a progress bar; returns the batches until then."""
        whole = int(of) if of.isdigit() else 0
        begin = epoch * whole or begin
        values = _pairs(rest)
        held = {name: value for name, value in values.items() if name.startswith(VALIDATED)}
        # The bar shows the last validation's on and on: they are of the end of an epoch.
        self._add((begin + (whole if batch == whole else 0)) // self.accumulated, held)
        trained = {name: value for name, value in values.items() if name not in held}
        self._add((begin + batch) // self.accumulated, trained, f"epoch {epoch}, batch {batch} of {of}")
        return begin + batch

    def _line(self, line: str) -> None:
        """A line with a loss, or with what a checkpoint was saved for."""
        values = _pairs(line)
        if match := REACHED.search(line):
            values.update(_pairs(f"{match[1]}={match[2]}"))
        epoch, step = EPOCH.search(line), STEP.search(line)
        place = f"epoch {epoch[1]}" if epoch else ""
        if step:
            self._add(int(step[1]), values, place)
        elif any("loss" in name and not name.startswith((*VALIDATED, "test")) for name in values):
            self._loose.append((values, place))

    def _add(self, step: int, values: dict[str, float], place: str = "") -> None:
        """Values at a step; of a run that was begun again they replace what it had from there on."""
        for name, value in values.items():
            points = self.columns.setdefault(name, [])
            while points and points[-1][0] >= step:
                points.pop()
            points.append((step, value))
        if values and place:
            self.places[step] = place


def _pairs(text: str) -> dict[str, float]:
    """Name -> number of "name=1.5", "name: 1.5", "name 1.5"; names in lower case, Lightning's "nan.0" is NaN."""
    found = {}
    for name, number in PAIR.findall(text):
        number = re.sub(r"(?i)(nan|inf)\.0*", r"\1", number)
        found["_".join(name.lower().split())] = float(number)
    return found
