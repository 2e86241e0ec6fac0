"""Threads that yield the processor to others, and memory that is kept. Imports nothing heavy: it must run before
torch is imported.

GNU OpenMP lets idle threads spin for milliseconds. On a machine that does anything else at the same time the
spinning thread keeps the working one off its core: a GRU over 16 x 100 x 512 took 3.3 s instead of 0.09 s.
"""

from __future__ import annotations

import ctypes
import os

CHOSEN = "RECIPES_OMP_NUM_THREADS"  # the number that set_threads has put into OMP_NUM_THREADS, inherited with it


def usable_cores() -> int:
    """Processor cores that this process may run on (the affinity mask, not the machine's count), at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return max(len(os.sched_getaffinity(0)), 1)
    return os.cpu_count() or 1


def set_threads(processes: int = 1) -> int:
    """As many OpenMP threads as usable cores, shared among so many processes of this machine, unless the environment says
    otherwise; they wait awake for some 50 microseconds and then sleep.

    The short wait bridges the gap from one operation to the next: a small recurrent model trains 1.4 times as fast on
    two idle cores as with threads that sleep at once, and no slower on busy ones.

    Has no effect on an OpenMP that is loaded already, so call it before `import torch`. Also has freed memory kept
    (`keep_memory`) and room for what oneDNN compiles for each shape of a batch: with its 1,024 places the Conformer's
    25 shapes drove each other out, and every step compiled again, a third of its time. Returns the number of threads.
    """
    keep_memory()
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # of GNU OpenMP, which torch's wheels bring; others pass over it
    # What a parent chose for itself is no wish of the user's: two processes of a training that the ladder starts, with as
    # many threads each as it has cores, took three times as long.
    if os.environ.get("OMP_NUM_THREADS") in (None, os.environ.get(CHOSEN)):
        os.environ["OMP_NUM_THREADS"] = os.environ[CHOSEN] = str(max(usable_cores() // processes, 1))
    return int(os.environ["OMP_NUM_THREADS"].split(",")[0])


def keep_memory() -> bool:
    """Lets glibc keep what is freed instead of giving it back to the system; returns whether it could.

    A training step frees and asks anew for the same tensors of some megabytes. By default each is mapped and its pages
    zeroed again: 14,000 page faults a step of the small DeepSpeech2, a fifth of its time. The limits are glibc's own:
    32 MB is the most it takes for one block.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # not glibc
        return False
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
    return all([mallopt(mmap_threshold, 32 << 20), mallopt(trim_threshold, 1 << 30), mallopt(top_pad, 64 << 20)])


def give_back_memory() -> bool:
    """Gives the system what is kept and free at this moment; returns whether there was anything.

    Batches of ever new lengths leave holes between them, which `keep_memory` would keep for good: 2 GB more after 1,500
    steps of 160 s of audio each at a tempo of its own. Once in a while is enough, the next steps ask for theirs again.
    """
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (OSError, AttributeError, TypeError):  # not glibc
        return False
