"""A forward pass of one process of several, of which the others know nothing and for which they do not wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def alone() -> Iterator[None]:
    """Within it this process is in no group: `torch.distributed.is_initialized()` is False, whoever imported it how.

    NeMo's encoders (which agree on the longest utterance in each forward pass), SyncBatchNorm, Lightning and
    torchmetrics then exchange nothing, as on one device. A collective that is called without that question raises
    ValueError at once, instead of waiting for ranks that do not come.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        yield
        return
    world = dist.group.WORLD
    dist.group.WORLD = None
    try:
        yield
    finally:
        dist.group.WORLD = world


def possible(trainer) -> bool:
    """Whether a process can compute the model without the others: on one device, and with DDP, where each holds all
    of it, unless there are more groups than the one of all ranks: `alone` does not take the process out of those."""
    if trainer.world_size == 1:
        return True
    from lightning.pytorch.strategies import DDPStrategy
    from torch.distributed import distributed_c10d

    return isinstance(trainer.strategy, DDPStrategy) and len(getattr(distributed_c10d, "_pg_map", ())) <= 1
