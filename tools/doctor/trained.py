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
