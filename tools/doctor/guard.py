"""Keeps a failing callback from ending the run that it watches."""

from __future__ import annotations

import functools
import logging

log = logging.getLogger("doctor")

ALWAYS = ("on_train_end", "on_exception", "_end_together")  # where the other devices wait for an answer, or a user does


def guarded(hook):
    """A hook that cannot end the run: where it fails, the callback says so and switches itself off."""

    @functools.wraps(hook)
    def safe(self, trainer, pl_module, *arguments, **keywords):
        if self._off and hook.__name__ not in ALWAYS:
            return
        try:
            hook(self, trainer, pl_module, *arguments, **keywords)
        except Exception as error:
            self._off = True
            self._listener.close()
            self._scan.stop()
            reason = f"{type(error).__name__} in {hook.__name__}: {' '.join(str(error).split())[:200]}"
            self.not_examined.append(f"run: after step {trainer.global_step} the callback was off: {reason}")
            log.warning("doctor: switched off, the run goes on: %s", reason, exc_info=True)

    return safe
