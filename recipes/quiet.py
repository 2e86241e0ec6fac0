"""Keeps NeMo's start-up chatter off the screen, so that what is printed is what the user asked for.

Imports nothing heavy. Errors stay visible; `NEMO_CTC_VERBOSE=1` in the environment keeps everything.
"""

from __future__ import annotations

import logging
import os
import warnings

# Who speaks at import and when a model is restored, and of what: telemetry that is off (nv_one_logger), the
# launcher's redirects, fonts, deprecated calls inside NeMo's dependencies.
LOGGERS = ("nv_one_logger", "torch.distributed.elastic.multiprocessing.redirects", "matplotlib", "numexpr")


def verbose() -> bool:
    """True where the user asked to see everything."""
    return os.environ.get("NEMO_CTC_VERBOSE", "0") not in ("", "0")


def quiet_imports() -> None:
    """To be called before NeMo is imported: no telemetry notes, no warnings of others' code, logs to stderr."""
    os.environ.setdefault("NEMO_REDIRECT_LOGS_TO_STDERR", "1")  # stdout is for results, it may be a pipe
    if verbose():
        return
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for category in (DeprecationWarning, FutureWarning, SyntaxWarning):
        warnings.filterwarnings("ignore", category=category)
    warnings.filterwarnings("ignore", message=".*ffmpeg.*")


def quiet_nemo() -> None:
    """To be called after NeMo is imported: its logger and Lightning's report errors only."""
    if not verbose():
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module="lightning.*")
        from nemo.utils import logging as nemo_logging

        nemo_logging.set_verbosity(nemo_logging.ERROR)
