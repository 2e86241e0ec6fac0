"""How much of the train manifest an epoch draws: a sampler may draw as often as there are rows, and always the same few."""

from __future__ import annotations

import torch
from torch import Tensor

from manifests.schema import ManifestError, scan_manifest
from tools.doctor.delivered import plain
from tools.doctor.finding import Finding

WHOLE = 0.9  # of the rows: as many draws as make an epoch
FEW, NEXT_TO_NOTHING = 0.5, 0.1  # of the texts; drawing by chance, with all alike, leaves 0.63
LINES = 200_000  # of the manifests, to be read
BATCHES = 50_000  # an epoch of more is left out: it may have no end
FEWEST = 32  # texts


def keys_of(batch) -> Tensor | None:
    """A number (B) for each text of a batch of NeMo's kind, by which it is known again; None for one of another kind."""
    if not isinstance(batch, (list, tuple)) or len(batch) < 4:
        return None
    targets, sizes = batch[2], batch[3]
    if not isinstance(targets, Tensor) or not isinstance(sizes, Tensor) or targets.dim() != 2 or targets.is_floating_point():
        return None
    if sizes.numel() != len(targets):
        return None
    at = torch.arange(targets.shape[1], device=targets.device)
    valid = at[None] < sizes.reshape(-1, 1)
    factor = (at * 1_000_003 + 12_345) * 2_654_435_761 % 2_147_483_647
    return ((targets.long() + 1) * factor * valid).sum(dim=1) * 4096 + sizes.reshape(-1).long()


def first_of(trainer, batch) -> list[int]:
    """Keys of the texts of a device's first batch, for the others to compare; [] on one device."""
    keys = keys_of(batch) if trainer.world_size > 1 else None
    return [] if keys is None else keys.tolist()


class Drawn:
    """Tells the texts of an epoch's batches apart by their targets."""

    def __init__(self, manifests: list[str]):
        self.manifests = list(manifests)
        self.keys: list[Tensor] = []
        self.judged = not self.manifests

    def take(self, batch) -> None:
        """A batch of NeMo's kind: (audio, lengths, targets (B, S), lengths (B))."""
        if self.judged or len(self.keys) > BATCHES or not isinstance(batch, (list, tuple)) or len(batch) < 4:
            return
        if (keys := keys_of(batch)) is None:
            self.judged = True
        else:
            self.keys.append(keys)

    def judge(self, trainer) -> Finding | None:
        """To be called when an epoch is over; a finding where few of the manifest's texts were in it."""
        if self.judged:
            return None
        self.judged = True
        keys, self.keys = self.keys, []
        try:
            rows = len(trainer.train_dataloader.dataset)
        except (TypeError, AttributeError, NotImplementedError):  # endless, or no rows
            return None
        draws = sum(map(len, keys))
        if trainer.world_size > 1 or draws < WHOLE * rows or rows > LINES or len(keys) > BATCHES:
            return None
        lines, texts = self._texts()
        there = len(texts) * min(rows / max(lines, 1), 1.0)  # some are filtered out
        if there < FEWEST:
            return None
        seen = len(torch.cat(keys).unique())
        if seen >= FEW * there:
            return None
        return Finding(
            "data-filtered", "prevents" if seen < NEXT_TO_NOTHING * there else "warning",
            f"In an epoch of {draws} draws there were {seen} different texts: the other {1 - seen / there:.0%} of the train "
            f"data ({rows} utterances) were never drawn.",
            "The sampler leaves them out: weights that differ by orders of magnitude (an exponential or a softmax of "
            "durations) draw the same few again and again, and these are learned by heart.",
            {"draws": draws, "different texts": seen, "texts of the manifest": len(texts), "utterances": rows},
            ["shuffle=True in place of a sampler of one's own",
             "weights within a factor of ten of each other, or replacement=False"], 0.85, where="the training loader")

    def _texts(self) -> tuple[int, set[str]]:
        lines, texts = 0, set()
        for path in self.manifests:
            try:
                for line in scan_manifest(path):
                    lines += 1
                    if lines > LINES:
                        return 0, set()
                    texts.add(plain(str((line.row or {}).get("text", ""))))
            except (ManifestError, OSError):
                continue
        return lines, texts
