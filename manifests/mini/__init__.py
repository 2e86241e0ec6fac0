"""The embedded corpus ``mini``: about an hour of synthetic English, made on the spot in LibriSpeech's native tree.

``python -m manifests.mini DEST`` from a shell, ``make(Path(DEST))`` from Python; build.py says what is written.
"""

from manifests.mini.build import MiniError, make

__all__ = ["MiniError", "make"]
