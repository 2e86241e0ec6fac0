"""Shared fixtures. Threads are set here because they count only before torch is imported."""

import os

from recipes.threads import set_threads

set_threads()
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HYDRA_FULL_ERROR", "0")

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def librispeech_sample() -> Path:
    """The folder that holds the subsets of 83 real LibriSpeech utterances; skips where it is not there."""
    tree = SHARED / "librispeech" / "sample" / "LibriSpeech"
    if not tree.is_dir():
        pytest.skip("real LibriSpeech sample ../shared/librispeech/sample is not on this machine")
    return tree
