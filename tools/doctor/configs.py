"""Any configuration in one shape: our recipes by name, NeMo's YAMLs, model sections, dicts, live models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tools.doctor.finding import Finding


class ConfigUnreadable(Exception):
    """A configuration that cannot be used; `finding` says why in words."""

    def __init__(self, finding: Finding):
        super().__init__(finding.symptom)
        self.finding = finding


def _refuse(symptom: str, where: str, fix: list[str], unreadable: bool = False) -> ConfigUnreadable:
    return ConfigUnreadable(
        Finding(
            "input-unreadable" if unreadable else "model-does-not-build",
            "prevents",
            symptom,
            "The configuration itself is wrong; nothing is built or trained from it.",
            {},
            fix,
            1.0,
            where=where,
            unreadable=unreadable,
        )
    )


class Settings:
    """A configuration.

    Attributes:
        cfg: the whole as DictConfig, with the model's part at `cfg.model`.
        recipe: whether it is one of ours (it has `training` and `corpus` beside `model`).
        prefix: "model." where overrides address the model's part so, "" where only that part was given.
        name: for messages.
    """

    def __init__(self, cfg: DictConfig, name: str, prefix: str = "model."):
        self.cfg, self.name, self.prefix = cfg, name, prefix
        self.recipe = "training" in cfg and "model" in cfg

    @classmethod
    def of_live(cls, model) -> Settings | None:
        """What a live NeMo model and its trainer know of their configuration; None where it has none."""
        cfg = getattr(model, "_cfg", None)
        if cfg is None:
            return None
        whole = {"model": OmegaConf.to_container(cfg, resolve=False)}
        trainer = getattr(model, "_trainer", None)
        if trainer is not None:
            names = {"max_steps": "max_steps", "max_epochs": "max_epochs", "gradient_clip_val": "gradient_clip_val",
                     "accumulate_grad_batches": "accumulate_grad_batches", "devices": "num_devices",
                     "num_nodes": "num_nodes", "precision": "precision"}
            values = {key: getattr(trainer, name, None) for key, name in names.items()}
            whole["trainer"] = {key: value for key, value in values.items() if isinstance(value, (int, float, str))}
        return cls(OmegaConf.create(whole), type(model).__name__)

    def get(self, key: str, default: Any = None) -> Any:
        """Value at a dotted key of the whole; `default` where it is absent, None, `???` or does not resolve."""
        try:
            value = OmegaConf.select(self.cfg, key, throw_on_missing=False)
        except OmegaConfBaseException:
            return default
        return default if value is None else value

    def number(self, key: str, default: float | None = None) -> float | None:
        """Like get, for a number: text that reads as one counts (`1e-3` is text in YAML 1.1)."""
        value = self.get(key)
        if isinstance(value, bool) or value is None:
            return default
        try:
            return float(value)
        except (TypeError, ValueError):
            return default

    def key(self, key: str) -> str:
        """`model.optim.lr` as the user has to write it."""
        return self.prefix + key.removeprefix("model.") if key.startswith("model.") else key

    @property
    def builds_model(self) -> bool:
        """Whether it says how to build a model."""
        return all(isinstance(self.get(f"model.{part}"), DictConfig) for part in ("encoder", "decoder"))

    @property
    def labels(self) -> list[str] | None:
        """Character labels, None with a tokenizer or where there are none."""
        if self.get("model.tokenizer") is not None:
            return None
        for key in ("model.decoder.vocabulary", "model.labels"):
            value = self.get(key)
            if isinstance(value, (ListConfig, list)) and len(value):
                return [str(label) for label in value]
        return None

    @property
    def tokenizer_dir(self) -> str | None:
        value = self.get("model.tokenizer.dir")
        return None if value is None else str(value)

    @property
    def sample_rate(self) -> int | None:
        for key in ("model.preprocessor.sample_rate", "model.sample_rate", "model.train_ds.sample_rate"):
            if (value := self.number(key)) is not None:
                return int(value)
        return None

    @property
    def manifests(self) -> dict[str, list[str]]:
        """Role -> paths of the manifests it names."""
        found = {}
        for role, section in (("train", "train_ds"), ("validation", "validation_ds"), ("test", "test_ds")):
            if paths := _paths(self.get(f"model.{section}.manifest_filepath")):
                found[role] = paths
        # Only those that have been made: a corpus names test sets that a training does not need.
        if self.recipe and "test" not in found:
            tests = [path for path in _paths(self.get("corpus.test")) if Path(path).is_file()]
            validation = set(found.get("validation", []))
            if tests := [path for path in tests if path not in validation]:
                found["test"] = tests
        return found


def _paths(value: Any) -> list[str]:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, (list, ListConfig)):
        return [path for item in value for path in _paths(item)]
    return []


def load_config(given: Any, overrides: Sequence[str] = ()) -> Settings:
    """The configuration behind a recipe's name, a path, a dict or a DictConfig. Raises ConfigUnreadable."""
    if isinstance(given, Settings):
        return given
    if isinstance(given, (dict, DictConfig)):
        cfg = given.copy() if isinstance(given, DictConfig) else OmegaConf.create(given)
        return _shaped(cfg, "the configuration given", overrides)
    if not isinstance(given, (str, Path)):
        raise _refuse(f"The configuration is a {type(given).__name__}.", "config",
                      ["give a recipe's name, a path, a dict or a DictConfig"], unreadable=True)
    from recipes.config import CONF, recipes

    path = Path(given)
    name = path.name.removesuffix(".yaml")
    # A recipe by its name, or by the path of its YAML, which alone would lack what its groups bring.
    if str(given) in recipes() or (name in recipes() and path.is_file() and path.resolve().parent == CONF):
        return _composed(name, overrides)
    if not path.is_file():
        raise _refuse(f"There is no configuration at {given}, and no recipe of that name.", str(given),
                      [f"give the path of a YAML or one of the recipes: {', '.join(recipes())}"], unreadable=True)
    try:
        cfg = OmegaConf.load(path)
    except Exception as error:  # yaml and omegaconf have no common kind
        raise _refuse(f"{path} is no YAML that can be read: {' '.join(str(error).split())[:200]}.", str(path),
                      ["mend the line it names"], unreadable=True) from None
    if not isinstance(cfg, DictConfig):
        raise _refuse(f"{path} holds a {type(cfg).__name__}, not keys with values.", str(path),
                      ["give a configuration of a model"], unreadable=True)
    return _shaped(cfg, str(path), overrides)


def _shaped(cfg: DictConfig, name: str, overrides: Sequence[str]) -> Settings:
    if overrides:
        cfg = OmegaConf.merge(cfg, OmegaConf.from_dotlist(list(overrides)))
    if "model" in cfg or not any(key in cfg for key in ("encoder", "decoder", "preprocessor", "optim")):
        return Settings(cfg, name)
    whole = OmegaConf.create({"model": OmegaConf.to_container(cfg, resolve=False)})
    # Interpolations of a model's own section are written from its root.
    try:
        whole = OmegaConf.create({"model": OmegaConf.to_container(cfg, resolve=True)})
    except OmegaConfBaseException:
        pass
    return Settings(whole, name, prefix="")


def _composed(name: str, overrides: Sequence[str]) -> Settings:
    """A recipe of ours. Values that training would refuse are kept: the schedule's checks name them."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    from recipes.config import CONF, ConfigError, hydra_arguments
    from recipes.config import compose as checked_compose

    held = GlobalHydra.instance().hydra  # examine() may be called from inside a Hydra program
    try:
        checked_compose(name, list(overrides))
    except ConfigError as error:
        try:
            GlobalHydra.instance().clear()
            with initialize_config_dir(config_dir=str(CONF), version_base="1.2"):
                return Settings(compose(name, overrides=hydra_arguments(list(overrides))), name)
        except HydraException:
            raise _refuse(f"{name}: {error}", name, ["mend the key or value it names"]) from None
    else:
        with initialize_config_dir(config_dir=str(CONF), version_base="1.2"):
            return Settings(compose(name, overrides=hydra_arguments(list(overrides))), name)
    finally:
        if held is not None:
            GlobalHydra.instance().hydra = held
