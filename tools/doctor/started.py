"""Models that start from another's weights, as NeMo's scripts do it: `init_from_nemo_model` of a configuration."""

from __future__ import annotations

from pathlib import Path

from tools.doctor.configs import no_file
from tools.doctor.finding import Finding
from tools.doctor.opening import build, does_not_build, restore, unreadable
from tools.doctor.subject import Subject

KEY = "init_from_nemo_model"
HEARS = ("sample_rate", "features", "window_size", "window_stride", "window", "n_fft", "normalize", "log", "frame_splicing",
         "lowfreq", "highfreq", "mag_power", "preemph")  # of a preprocessor: what decides how its features look
FEW = 0.5  # share of the model's values that the weights give, below which it is said


def open_started(subject: Subject):
    """The model of a configuration, with the weights that it starts from. Raises ModelUnreadable.

    Without sections encoder and decoder it is the other model itself (NeMo's speech_to_text_finetune.py), with the
    tokenizer or the labels that the configuration puts in place of its own.
    """
    settings = subject.settings
    path = settings.starts_from
    if path is None and settings.builds_model:
        return build(settings)
    if path is None:
        raise does_not_build(
            ValueError(f"{KEY} is null"), settings.key(KEY), "The configuration is one for fine-tuning, and names "
            "neither a model to start from nor an encoder and a decoder to build one.",
            [f"{KEY}=model.nemo", "or init_from_pretrained_model=NAME"])
    if (absent := no_file(path, "model")) is not None:
        raise unreadable(absent, KEY, [f"{KEY}=the path of a .nemo"])
    other = restore(Path(path), subject)
    if not settings.builds_model:
        return _revocabularied(other, settings)
    model = build(settings)
    subject.findings += _taken_over(model, other, path)
    return model


def _revocabularied(model, settings):
    """The model with the new tokenizer or labels, where the configuration asks for them."""
    tokens = bool(settings.get("model.tokenizer.update_tokenizer"))
    try:
        if tokens:
            folder, kind = settings.tokenizer_dir, str(settings.get("model.tokenizer.type") or "bpe")
            model.change_vocabulary(new_tokenizer_dir=folder, new_tokenizer_type=kind)
        elif settings.get("model.char_labels.update_labels"):
            model.change_vocabulary(new_vocabulary=list(settings.get("model.char_labels.labels") or []))
    except Exception as error:  # no folder, no labels, a tokenizer for a model of characters
        where = settings.key("model.tokenizer" if tokens else "model.char_labels")
        raise does_not_build(error, where, "The new vocabulary cannot be put in place of the model's own.",
                             [f"mend {where} as the message says"]) from error
    return model


def _taken_over(model, other, path: str) -> list[Finding]:
    """Copies what fits, as NeMo does; a finding where NeMo would stop, or take over little of it."""
    own, given = model.state_dict(), other.state_dict()
    shared = [name for name in own if name in given]
    unlike = [name for name in shared if own[name].shape != given[name].shape]
    if unlike:
        name = unlike[0]
        tail = all(part.startswith("decoder.") for part in unlike)
        error = RuntimeError(f"size mismatch for {name}: {tuple(given[name].shape)} in {path}, "
                             f"{tuple(own[name].shape)} in this model")
        return [does_not_build(
            error, KEY, "NeMo takes weights over by their names, and stops where shapes differ: "
            + ("the vocabularies are of different size." if tail else "the models are of different size."),
            [f"{KEY}.model0.path={path} {KEY}.model0.exclude=[decoder] in place of {KEY}, so that the decoder starts "
             "anew", "or the tokenizer (labels) of that model"] if tail else ["the sizes of the model that the weights "
                                                                              "are of"]).finding]
    model.load_state_dict({name: given[name] for name in shared}, strict=False)
    own_cfg, given_cfg = ((getattr(each, "cfg", None) or {}).get("preprocessor") for each in (model, other))
    found = other_features(own_cfg, given_cfg, path)
    own = {name: value for name, value in own.items() if not name.startswith(("preprocessor.", "spec_augmentation."))}
    share = sum(own[name].numel() for name in shared if name in own) / max(sum(v.numel() for v in own.values()), 1)
    if share >= FEW:
        return found
    return [*found, Finding(
        "weights-not-taken", "warning", f"Of this model's values {share:.0%} come from {path}: the rest starts anew.",
        "NeMo takes over what has the same name and says nothing of the rest. Another class or another version names "
        "its parts otherwise.",
        {"share": round(share, 3), "names of this model that it lacks": [n for n in own if n not in given][:5],
         "names of it that this model lacks": [n for n in given if n not in own][:5]},
        ["use the configuration that is in the .nemo, or restore the model itself (ASRModel.restore_from)"], 0.9,
        where=KEY)]


def other_features(own, given, path: str) -> list[Finding]:
    """A finding where two sections `preprocessor` make other features of the same audio; what one leaves out is not
    known of it."""
    if not own or not given:
        return []
    differ = {key: f"{given[key]} there, {own[key]} here" for key in HEARS
              if key in own and key in given and own[key] != given[key]}
    if not differ:
        return []
    return [Finding(
        "features-bad", "warning",
        f"The weights were trained with other features: {', '.join(f'{key} {values}' for key, values in differ.items())}.",
        "To the weights that are taken over these features are of another scale, time or pitch: what they know does not fit, "
        "and running statistics are those of other numbers.",
        differ, [f"model.preprocessor.{key}={'null' if given[key] is None else given[key]}" for key in differ], 0.95,
        where="model.preprocessor")]
