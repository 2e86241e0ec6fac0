"""Any configuration in one shape: our recipes by name, NeMo's YAMLs, model sections, dicts, live models."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tools.doctor.finding import Finding
from tools.doctor.sources import Source, options, paths, sources

DATA_SECTIONS = {"train": "train_ds", "validation": "validation_ds", "test": "test_ds"}


class ConfigUnreadable(Exception):
    """A configuration that cannot be used; `finding` says why in words."""

    def __init__(self, finding: Finding):
        super().__init__(finding.symptom)
        self.finding = finding


def no_file(path: Any, what: str) -> str | None:
    """Why there is no file to open at a path, as a sentence; None where there is one. `what` was expected there."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            return f"There is no {what} at {path}."
        return f"{path} cannot be read: {error.strerror or error}."
    except ValueError:  # characters that no path has
        return f"There is no {what} at {path!r}."
    return f"{path} is a folder, not a {what}." if stat.S_ISDIR(mode) else None


def _refuse(symptom: str, where: str, fix: list[str], unreadable: bool = False) -> ConfigUnreadable:
    return ConfigUnreadable(
        Finding(
            "input-unreadable" if unreadable else "model-does-not-build",
            "prevents",
            symptom,
            "It is not there, or not of the kind that was expected." if unreadable else
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
        refused: why training would not start from it, "" where nothing says so.
    """

    def __init__(self, cfg: DictConfig, name: str, prefix: str = "model.", refused: str = ""):
        self.cfg, self.name, self.prefix, self.refused = cfg, name, prefix, refused
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
    def starts_from(self) -> str | None:
        """The `.nemo` whose weights a configuration of NeMo's starts from, where it is one and named by its path."""
        value = None if self.recipe else self.get("init_from_nemo_model")
        return value if isinstance(value, str) else None

    @property
    def fine_tunes(self) -> bool:
        """Whether it is one for NeMo's fine-tuning script: the model is in a `.nemo`, and no encoder is configured."""
        return (not self.recipe and bool(self.prefix) and "init_from_nemo_model" in self.cfg
                and self.get("model.encoder") is None and not self.get("init_from_pretrained_model")
                and (self.starts_from is not None or self.get("init_from_nemo_model") is None))

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

    def sources(self, role: str) -> tuple[list[Source], list[str]]:
        """(the manifests that the role's data section names, what else it names there: see sources.sources)."""
        return sources(self.get(f"model.{DATA_SECTIONS[role]}"), self.reader(role))

    def options(self, role: str) -> Source:
        """How manifests of a role are read that its data section does not name."""
        return options(self.get(f"model.{DATA_SECTIONS.get(role, 'train_ds')}"), self.reader(role))

    def reader(self, role: str) -> str:
        """Whose loader reads the manifests of a role: see sources.Source."""
        lhotse = self.get(f"model.{DATA_SECTIONS.get(role, 'train_ds')}.use_lhotse")
        return "recipe" if self.recipe else "lhotse" if lhotse else "nemo"

    @property
    def manifests(self) -> dict[str, list[str]]:
        """Role -> paths of the manifests it names."""
        found = {role: [source.path for source in self.sources(role)[0]] for role in DATA_SECTIONS}
        found = {role: named for role, named in found.items() if named}
        # Only those that have been made: a corpus names test sets that a training does not need.
        if self.recipe and "test" not in found:
            tests = [path for path in paths(self.get("corpus.test")) if Path(path).is_file()]
            validation = set(found.get("validation", []))
            if tests := [path for path in tests if path not in validation]:
                found["test"] = tests
        return found


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
    from recipes.config import CONF, recipes, suggest

    path = Path(given)
    name = path.name.removesuffix(".yaml")
    absent = no_file(given, "configuration")
    # A recipe by its name, or by the path of its YAML, which alone would lack what its groups bring.
    if str(given) in recipes() or (name in recipes() and absent is None and path.resolve().parent == CONF):
        return _composed(name, overrides)
    if absent is not None:
        near = suggest(name, recipes()) if path.name == str(given) else ""
        raise _refuse(f"{absent.removesuffix('.')}, and no recipe of that name{near or '.'}", str(given),
                      [f"give the path of a YAML or one of the recipes: {', '.join(recipes())}"], unreadable=True)
    try:
        cfg = OmegaConf.load(path)
    except OSError as error:
        raise _refuse(f"{path} cannot be read: {error.strerror or error}.", str(path),
                      ["look at who may read it (ls -l)"], unreadable=True) from None
    except Exception as error:  # yaml and omegaconf have no common kind
        raise _refuse(f"{path} is no YAML that can be read: {' '.join(str(error).split())[:200]}.", str(path),
                      ["mend the line it names"], unreadable=True) from None
    if not isinstance(cfg, DictConfig):
        kind = "list" if isinstance(cfg, ListConfig) else type(cfg).__name__
        raise _refuse(f"{path} holds a {kind}, not keys with values.", str(path),
                      ["give a configuration of a model"], unreadable=True)
    return _shaped(cfg, str(path), overrides)


PARTS = ("preprocessor", "encoder", "decoder", "spec_augment", "optim", "train_ds", "validation_ds", "test_ds")
SECTIONS = ("model", "trainer", "exp_manager", "training", "corpus", *PARTS, "tokenizer", "labels")


def _shaped(cfg: DictConfig, name: str, overrides: Sequence[str]) -> Settings:
    if not cfg or cfg._is_none():
        raise _refuse(f"{name} is empty.", name, ["give a configuration of a model"], unreadable=True)
    prefix = ""
    if list(cfg) == ["cfg"] and isinstance(inner := cfg._get_node("cfg"), DictConfig) and len(inner):
        # hparams.yaml of a NeMo run: the model's section, which NeMo's own scripts address as model.
        cfg, prefix = OmegaConf.create(OmegaConf.to_container(inner, resolve=False)), "model."
    if not any(key in cfg for key in SECTIONS):
        found = ", ".join(map(str, list(cfg)[:5]))
        raise _refuse(f"{name} holds nothing of a model or a training, only {found}.", name,
                      [f"give a configuration with sections such as {', '.join(SECTIONS[:2])}, or with those of a "
                       f"model: {', '.join(PARTS[:5])}"], unreadable=True)
    if overrides:
        cfg = _overridden(cfg, name, overrides)
    for key in ("model", "trainer", *PARTS, *(f"model.{part}" for part in PARTS)):
        _check_section(cfg, key, name)
    if "model" in cfg or not any(key in cfg for key in ("encoder", "decoder", "preprocessor", "optim")):
        return Settings(cfg, name)
    whole = OmegaConf.create({"model": OmegaConf.to_container(cfg, resolve=False)})
    # Interpolations of a model's own section are written from its root.
    try:
        whole = OmegaConf.create({"model": OmegaConf.to_container(cfg, resolve=True)})
    except OmegaConfBaseException:
        pass
    return Settings(whole, name, prefix)


def _check_section(cfg: DictConfig, key: str, name: str) -> None:
    """Raises ConfigUnreadable where a section is there and is none. A part of a model may be null: it is left out."""
    above, _, last = key.rpartition(".")
    holder = cfg
    for part in [above, last] if above else [last]:
        if not isinstance(holder, DictConfig) or holder._is_none() or holder._is_missing() \
                or holder._is_interpolation() or part not in holder.keys():
            return
        node = holder = holder._get_node(part)
    if node._is_missing() or node._is_interpolation():
        return
    if isinstance(node, DictConfig) and not node._is_none():
        return
    if not node._is_none() or key.rpartition(".")[2] in ("model", "encoder", "decoder"):
        kind = "null" if node._is_none() else "a list" if isinstance(node, ListConfig) else repr(node._value())
        raise _refuse(f"{name}: {key} is {kind}, not a section of keys with values.", key,
                      [f"write the keys of {key} below it, each on a line of its own, indented"])


def _overridden(cfg: DictConfig, name: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration with `KEY=VALUE` for what it has, `+KEY=VALUE` for what it has not: Hydra's rule."""
    from recipes.config import suggest

    for line in overrides:
        key, sign, value = line.partition("=")
        bare = key.lstrip("+")
        if not sign or not bare:
            raise _refuse(f"The override {line!r} is not KEY=VALUE.", line, ["write it as model.optim.lr=1e-3"])
        node, walked = cfg, ""
        for part in bare.split("."):
            if not isinstance(node, DictConfig):
                if isinstance(node, ListConfig):
                    break  # an item of a list, by its number
                raise _refuse(f"The override {line!r} cannot be: {walked} is a value, not a section.", walked,
                              [f"{walked}=VALUE"])
            path = f"{walked}.{part}" if walked else part
            if part not in node.keys() and not key.startswith("+"):
                near = suggest(path, [f"{walked}.{k}" if walked else str(k) for k in node])
                raise _refuse(f"{name} has no key {path}{near} (to add it all the same: +{bare}=...)", path,
                              ["mend the key, or write + before it"])
            walked = path
            if part not in node.keys() or OmegaConf.is_missing(node, part):
                break
            try:
                node = node[part]
            except OmegaConfBaseException:
                break  # what it refers to is not there: told elsewhere
        try:
            cfg = OmegaConf.merge(cfg, OmegaConf.from_dotlist([f"{bare}={value}"]))
        except Exception as error:  # yaml and omegaconf have no common kind
            raise _refuse(f"The override {line!r} cannot be used: {' '.join(str(error).split())[:200]}.", line,
                          ["write it as model.optim.lr=1e-3"]) from None
    return cfg


def _composed(name: str, overrides: Sequence[str]) -> Settings:
    """A recipe of ours. Values that training would refuse are kept, for the checks to name; so is why it would."""
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
                return Settings(compose(name, overrides=hydra_arguments(list(overrides))), name, refused=str(error))
        except HydraException:
            raise _refuse(f"{name}: {error}", name, ["mend the key or value it names"]) from None
    else:
        with initialize_config_dir(config_dir=str(CONF), version_base="1.2"):
            return Settings(compose(name, overrides=hydra_arguments(list(overrides))), name)
    finally:
        if held is not None:
            GlobalHydra.instance().hydra = held
