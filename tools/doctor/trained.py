"""Whether weights that are frozen were trained before, as in a fine-tuning, or are those they were drawn with."""

from __future__ import annotations

import sys

FROM_TRAINED = ("init_from", "init_from_nemo_model", "init_from_pretrained_model", "init_from_ptl_ckpt")
ADAPTERS = ("adapter", "lora")  # in the names of what is trained beside a model that stays as it is
LEAST = 1000  # values of a matrix whose distribution says something
# Mean by largest absolute value: 0.5 where values are drawn evenly between two bounds, as torch's linear,
# convolutional and recurrent layers and NeMo's encoders draw them. Training leaves a few far beyond the rest.
EVEN = (0.48, 0.52)


def look_trained(weights: dict) -> bool | None:
    """Whether frozen weights (name -> tensor) were trained: True, False, or None where they do not say.

    The gains of normalisations tell: they begin equal, mostly at 1, and a single step of training makes them differ.
    Without any, matrices whose values are still spread evenly are as they were drawn.
    """
    weights = {name: w.detach() for name, w in weights.items()}
    gains = [w for name, w in weights.items() if name.endswith("weight") and w.dim() == 1 and w.numel() > 1]
    if gains:
        differ = sum(float(w.max() - w.min()) > 1e-6 * max(float(w.abs().max()), 1e-12) for w in gains)
        return differ >= 0.5 * len(gains)
    large = [w.float().abs() for w in weights.values()
             if w.dim() > 1 and w.numel() >= LEAST and w.is_floating_point()]
    total = sum(w.numel() for w in large)
    even = sum(w.numel() for w in large if EVEN[0] < float(w.mean()) / max(float(w.max()), 1e-12) < EVEN[1])
    return False if total and even > 0.5 * total else None


def started_from(settings, model=None, trainer=None, trained=()) -> str:
    """What says that a run did not begin with random weights, in words; "" where nothing does.

    `settings`: configs.Settings or None. `trained`: names of the parameters that are not frozen.
    """
    for key in FROM_TRAINED if settings is not None else ():
        if settings.get(key) or settings.get(f"model.{key}"):
            return f"the configuration has {key}"
    if any(part.lower().startswith(ADAPTERS) for name in trained for part in name.split(".")):
        return "adapters are trained"
    if getattr(trainer, "ckpt_path", None):
        return f"the run goes on from {trainer.ckpt_path}"
    if path := _restored(model):
        return f"the model was restored from {path}"
    return ""


def judged(weights: dict, started: str) -> tuple[bool, str]:
    """(whether frozen weights are random for all that can be told, what says so or does not, a sentence)."""
    if started:
        return False, f"That is right in a fine-tuning, and {started}."
    trained = look_trained(weights)
    if trained is False:
        return True, ("They look as they were drawn: gains all alike, or values spread evenly. Frozen random weights "
                      "learn nothing.")
    if trained:
        return False, "The gains of their normalisations differ, so they were trained before: it may be meant."
    return False, ("Nothing in them says whether they were trained before: frozen trained weights may be meant, frozen "
                   "random ones learn nothing.")


def left_out(missing: dict, started: str) -> tuple[bool, str]:
    """(whether trainable parameters that no optimizer holds were forgotten, as far as can be told; why not).

    A part that is left out of a fine-tuning was trained before; a decoder that was put in too late was not. Parts are
    judged one by one, so that the one does not cover up the other.
    """
    parts: dict[str, dict] = {}
    for name, p in missing.items():
        parts.setdefault(name.split(".")[0], {})[name] = p
    for weights in parts.values():
        trained = look_trained(weights)
        if trained is False or trained is None and not started:
            return True, ""
    return False, ("It may be meant: " + (started or "the gains of their normalisations differ, so they were trained "
                                          "before") + ".")


def copies(missing: dict, held: dict) -> bool:
    """Whether parameters are averaged weights or a teacher's: none with a gradient at the first step, and each with a
    namesake of its shape among those that an optimizer holds."""
    shapes = {(tail, tuple(p.shape)) for name, p in held.items() for tail in _tails(name)[:2]}
    return all(p.grad is None and any((tail, tuple(p.shape)) in shapes for tail in _tails(name)[1:])
               for name, p in missing.items())


def _tails(name: str) -> list[str]:
    """A name without its first 0, 1, 2 ... parts; at least two parts are left."""
    parts = name.split(".")
    return [".".join(parts[k:]) for k in range(max(len(parts) - 1, 1))]


def _restored(model) -> str | None:
    """The .nemo that a live model comes from; None for any other."""
    state = sys.modules.get("nemo.utils.app_state")
    guid = getattr(model, "model_guid", None)
    if state is None or guid is None:
        return None
    try:
        return state.AppState().get_model_metadata_from_guid(guid).restoration_path
    except KeyError:
        return None
