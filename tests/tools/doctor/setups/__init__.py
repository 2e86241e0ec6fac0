"""What faults and healthy set-ups are made of: small speech, small models, short trainings."""

from __future__ import annotations

from pathlib import Path


def live(folder: Path, encoder="rnn", cls=None, seed: int = 0, corpus: dict | None = None, **more) -> dict:
    """A live model and its manifests, as `examine` takes them.

    `encoder` is a name of setups/models.py or a section; `more` replaces sections of the configuration.
    """
    from tests.tools.doctor.setups import models, tones

    given = tones.manifests(folder, **(corpus or {}))
    return {"model": models.build(models.section(encoder, given, **more), seed, cls), "manifests": given}


def written(folder: Path, encoder="rnn", corpus: dict | None = None, trainer=None, **more) -> dict:
    """A YAML file with `model:` and `trainer:` and its manifests, as `examine` takes them."""
    import yaml

    from tests.tools.doctor.setups import models, tones

    given = tones.manifests(folder, **(corpus or {}))
    path = Path(folder) / "config.yaml"
    path.write_text(yaml.safe_dump(models.recipe(encoder, given, trainer, **more), sort_keys=False))
    return {"config": str(path), "manifests": given}


def data(folder: Path, change, encoder="rnn", **corpus) -> dict:
    """Manifests whose train rows went through `change(rows)`, with the configuration of a healthy model."""
    from tests.tools.doctor.setups import models, tones

    given = tones.manifests(folder, change(tones.corpus(folder, **corpus)))
    return {"config": models.recipe(encoder, given), "manifests": given}


def mine(module: str, name: str = "Encoder", **arguments) -> dict:
    """The encoder section that names a class of one's own."""
    from tests.tools.doctor.setups.models import FEATURES

    return {"_target_": f"{module}.{name}", "feat_in": FEATURES, **arguments}
