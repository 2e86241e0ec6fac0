"""A shelf of made-up packages with their lock, and a corpus of four made-up utterances. No network."""

import base64
import hashlib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from manifests.schema import write_manifest


def make_wheel(folder: Path, name: str, version: str = "1.0", requires=(), tag="py3-none-any") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-{tag}.whl"
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    texts = {f"{name}.py": f"version = '{version}'\n", f"{info}/METADATA": metadata + "".join(
        f"Requires-Dist: {one}\n" for one in requires), f"{info}/WHEEL": f"Wheel-Version: 1.0\nTag: {tag}\n"}
    record = "".join(f"{one},sha256={_digest(text)},{len(text)}\n" for one, text in texts.items())
    with zipfile.ZipFile(path, "w") as archive:
        for one, text in {**texts, f"{info}/RECORD": record + f"{info}/RECORD,,\n"}.items():
            archive.writestr(one, text)
    return path


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


@pytest.fixture
def shelf(tmp_path):
    """A lock over made-up packages, and a fetch that gives their wheels."""
    requires = {
        "top": ["middle[fast]>=1", "numpy>=1", "only-windows; sys_platform == 'win32'", "wandb"],
        "middle": ["speed; extra == 'fast'", "slow; extra == 'other'", "Deep_One"], "speed": [], "deep-one": ["top"],
    }
    lock = tmp_path / "requirements.lock"
    lock.write_text("# made\n" + "".join(f"{name}==1.0 \\\n    --hash=sha256:00\n" for name in requires)
                    + "numpy==2.0 ; python_full_version >= '3.12' \\\n    --hash=sha256:00\n"
                    + "numpy==1.0 ; python_full_version < '3.12' \\\n    --hash=sha256:00\n")
    asked = []

    def fetch(pins, target, folder):
        asked.extend(pins)
        made = {name: make_wheel(folder, name.replace("-", "_"), version, requires.get(name, []))
                for name, (version, _) in pins.items()}
        return made, []

    return SimpleNamespace(lock=lock, fetch=fetch, asked=asked)


@pytest.fixture
def corpus(tmp_path):
    """Manifests of four made-up utterances, FLAC and WAV, one of them in two splits."""
    generator = np.random.default_rng(0)
    rows = []
    lengths = {"s1/a.flac": 16_000, "s1/b.flac": 8001, "s2/c.wav": 12_345, "d.flac": 500}
    for i, (name, samples) in enumerate(lengths.items()):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.1 * generator.standard_normal(samples), 16_000, subtype="PCM_16")
        rows.append({"audio_filepath": str(path), "duration": samples / 16_000, "text": "a b", "utterance": str(i)})
    folder = tmp_path / "small"
    write_manifest(folder / "train.json", rows[:3])
    write_manifest(folder / "dev.json", rows[2:])
    return folder
