"""lhotse cuts of NeMo's manifests, where NeMo 3.0.0 itself reads other audio than a row names."""

from __future__ import annotations

from nemo.collections.common.data.lhotse import cutset
from nemo.collections.common.data.lhotse.nemo_adapters import LazyNeMoIterator

BEHIND = 0.1  # seconds


class ManifestCuts(LazyNeMoIterator):
    """The rows of a manifest as cuts: each with the audio that the row names, and with an id that no other audio has.

    For a row with `sampling_rate` NeMo takes `duration`, that of the segment, for the whole file's, so that lhotse cuts
    a segment with an `offset` off at its own length: it loses its first `offset` seconds with all of its text left, or
    everything. Without `sampling_rate` the id is the file's name without its folders, which files share; and times in
    it are rounded to 10 ms. Features are kept by that id (recipes.data.FeatureCache).
    """

    def _create_cut(self, audio_path, offset, duration, sampling_rate=None):
        if offset is None or sampling_rate is None or self.metadata_only:
            cut = super()._create_cut(audio_path, offset, duration, sampling_rate)
        else:
            # Of what it takes for a whole recording lhotse reads the file to its end: this one goes on a little.
            whole = self._create_recording(audio_path, offset + duration + BEHIND, sampling_rate).to_cut()
            cut = whole.truncate(offset=offset, duration=duration, preserve_id=True)
        cut.id = str(audio_path) if offset is None else f"{audio_path}@{offset}+{duration}"
        return cut


def read_manifests_with_ours() -> None:
    """From now on NeMo's loaders read manifests through ManifestCuts; it has no setting for it."""
    cutset.LazyNeMoIterator = ManifestCuts
