"""A look at the outputs of all modules, now and then: those that are far larger than any that trains."""

from __future__ import annotations

import math

from tools.doctor.autopsy import Output, Watch
from tools.doctor.finding import Finding, Plot
from tools.doctor.pace import Pace
from tools.doctor.trace import Trace

EVERY = 200  # steps between two looks
FIRST = (0, 20)
LARGE = 1e4  # an output beyond this is on its way out; those of models that train stay below
GROWS = 1e3  # times from the first frames to the last


class Scan:
    """Hooks on all modules for the length of a forward pass."""

    def __init__(self, pace: Pace):
        self.pace, self.done, self._watch = pace, False, None

    def begin(self, model, step: int) -> None:
        """Before a batch, where it is time for a look."""
        self._watch = None
        if step in FIRST or (step % EVERY == 0 and self.pace.affordable()):
            self._watch = Watch(model, leaves_only=True, counted=lambda: self.pace.counted(model.device))
            self._watch.__enter__()

    def stop(self) -> list[Output]:
        """Takes the hooks off all modules; returns what they saw."""
        if self._watch is None:
            return []
        self._watch.__exit__()
        outputs, self._watch = self._watch.outputs, None
        return outputs

    def end(self, found: list[Finding], trace: Trace) -> list[Finding]:
        """After the forward pass: the findings, with what this look says in place of what the last one said."""
        if self._watch is None:
            return found
        self.done = True
        return [f for f in found if f.id != "explodes"] + scanned(self.stop(), trace)


def scanned(outputs: list[Output], trace: Trace) -> list[Finding]:
    """A finding where a module's output, still finite, is far larger than any that trains."""
    large = [o for o in outputs if o.finite and o.largest > LARGE and "preprocessor" not in o.name and "featurizer" not
        in o.name]
    if not large or trace.bad is not None:
        return []
    first = large[0]
    values = [v for v in (first.growth or ([], []))[1] if math.isfinite(v)]
    times = max(values) / max(values[0], 1e-30) if len(values) > 3 else 0.0
    in_time = times > GROWS
    plots = [Plot("Largest output of each module, in order of execution", "module", "largest absolute value",
                  {"": (list(range(1, len(outputs) + 1)), [o.largest for o in outputs])},
                  f"the first above {LARGE:g} is {first.name}")]
    if first.growth:
        plots.append(Plot(f"Largest output of {first.name} over time", "frame", "largest absolute value",
            {"": first.growth}))
    return [Finding(
        "explodes", "warning",
        f"The output of {first.name} ({first.kind}) reaches {first.largest:.2g} at step {trace.last_step + 1}"
        + (f", growing {times:.2g} times from the first frames to the last." if in_time else "."),
        "A recurrence without a bound and without normalisation grows exponentially with the utterance." if in_time
        else "Nothing keeps the scale between the layers; the next step may be infinite.",
        {"largest output": first.largest, "seen at step": trace.last_step + 1,
         "modules above 1e4": [o.name for o in large][:8]},
        [f"a bounded or gated recurrence in {first.name}" if in_time else f"a normalisation before {first.name}",
         f"a lower {trace.key('model.optim.lr')} only delays it"], 0.8 if in_time else 0.6, where=first.name,
         plots=plots)]
