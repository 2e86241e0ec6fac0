"""The validation's WER counted anew while a run goes on: in which validations, of which batches, in how much time."""

from __future__ import annotations

from tools.doctor.metrics import Tally, other_rate

TRIES = 3  # validations that may turn out too long to be counted within the budget


class Recount:
    """`open` at the beginning of a validation, `take` a batch, `close` at its end; `why_not` is "" or a line."""

    def __init__(self):
        self.why_not = ""
        self._tally: Tally | None = None
        self._set = 0  # of several validation sets the one whose rate is `val_wer`
        self._cut = 0

    def open(self, trainer, model, found, examined) -> None:
        """A new count, unless there has been one, or the reported rate cannot be that of what is seen here."""
        self._tally, self._set = None, getattr(model, "_val_dl_idx", 0)  # NeMo's: of the others it logs the names
        if not Tally.wanted(found, examined) or self._cut >= TRIES:
            return
        batches = trainer.num_val_batches
        several = isinstance(batches, list) and len(batches) > 1 and not hasattr(model, "_val_dl_idx")
        why = ("on several devices each sees a part of the validation" if trainer.world_size > 1 else
               "of several validation sets the rate may count all" if several else other_rate(model))
        self.why_not = f"{Tally.title}: {why}" if why else ""
        self._tally = None if why else Tally(model)

    def hears(self, dataloader_idx: int) -> bool:
        """Whether the next batch is one to count."""
        return self._tally is not None and dataloader_idx == self._set

    def take(self, call, affordable: bool) -> None:
        """Counts a batch; all must be, with a loss that could be heard, within the time there is."""
        if not affordable:
            self._cut += 1
            if self._cut == TRIES:
                self.why_not = f"{Tally.title}: it takes more than the callback's share of the run's time"
        if not affordable or call is None or not self._tally.add(call):
            self._tally = None

    def close(self, metrics: dict[str, float]):
        """Findings on the reported rate; None where there is nothing to compare yet."""
        tally, self._tally = self._tally, None
        return None if tally is None else tally.judge(metrics)
