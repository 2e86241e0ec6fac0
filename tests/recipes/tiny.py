"""A tiny random NeMo CTC model and noise that stands for speech: what the tests of the entry points share."""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile

LABELS = [" ", *"abcdefghijklmnopqrstuvwxyz", "'"]
RATE = 16000


def config(target: str | None = None, features: int = 16):
    """Configuration of a two-layer convolutional model with masks, 2x subsampling; `target` names its class."""
    from omegaconf import OmegaConf

    def layer(stride):
        return {"filters": 24, "repeat": 1, "kernel": [5], "stride": [stride], "dilation": [1], "dropout": 0.2,
                "residual": False, "separable": False}

    cfg = {
        "sample_rate": RATE,
        "labels": LABELS,
        "preprocessor": {"_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
                         "features": features, "sample_rate": RATE, "window_size": 0.025, "window_stride": 0.01,
                         "n_fft": 512, "dither": 1e-5},
        "spec_augment": {"_target_": "nemo.collections.asr.modules.SpectrogramAugmentation", "freq_masks": 2,
                         "time_masks": 5, "freq_width": 8, "time_width": 0.2},
        "encoder": {"_target_": "nemo.collections.asr.modules.ConvASREncoder", "feat_in": features,
                    "activation": "relu", "conv_mask": True, "jasper": [layer(2), layer(1)]},
        "decoder": {"_target_": "nemo.collections.asr.modules.ConvASRDecoder", "feat_in": 24,
                    "num_classes": len(LABELS), "vocabulary": LABELS},
    }
    return OmegaConf.create({**cfg, **({"target": target} if target else {})})


def bpe_config(folder: Path):
    """The same over 32 sentencepiece tokens, whose tokenizer is trained into `folder`."""
    import sentencepiece
    from omegaconf import OmegaConf, open_dict

    text = folder / "text.txt"
    text.write_text("the cat sat on the mat\nthe dog ran to the cat\na bat and a rat sat and ran\n" * 5)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), vocab_size=32, model_type="bpe", minloglevel=2
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    vocabulary = [pieces.id_to_piece(i) for i in range(pieces.get_piece_size())]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    cfg = config()
    with open_dict(cfg):
        cfg.tokenizer = OmegaConf.create({"dir": str(folder), "type": "bpe"})
        cfg.decoder.vocabulary = []
        cfg.decoder.num_classes = -1
    return cfg


@lru_cache(maxsize=1)
def model():
    """NeMo's EncDecCTCModel with random weights, shared by a test session: leave it as it is."""
    import torch
    from nemo.collections.asr.models import EncDecCTCModel

    torch.manual_seed(0)
    built = EncDecCTCModel(config()).eval()
    talkative(built)
    return built


def talkative(built) -> None:
    """Spread the outputs of a random model so that letters, spaces and blanks all occur."""
    import torch

    with torch.no_grad():
        convolution = built.decoder.decoder_layers[0]
        convolution.weight.mul_(4.0)
        convolution.bias[0] += 3.0  # the space: several words in a hypothesis


def write_audio(path: Path, seconds: float, seed: int = 0, rate: int = RATE, channels: int = 1) -> Path:
    """Noise whose colour changes every tenth of a second; the format follows from the suffix."""
    generator = np.random.default_rng(seed)
    count = int(round(seconds * rate))
    t = np.arange(count) / rate
    tone = np.repeat(generator.uniform(200, 3500, count // (rate // 10) + 1), rate // 10)[:count]
    audio = 0.3 * np.sin(2 * np.pi * tone * t) + 0.05 * generator.standard_normal(count)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.stack([audio] * channels, axis=1) if channels > 1 else audio, rate)
    return path


def write_rows(path: Path, rows: list[dict]) -> Path:
    """A manifest written without the project's own writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def corpus(folder: Path, seconds=(1.0, 0.4, 2.1, 0.7, 1.6, 0.5), **fields) -> list[dict]:
    """Rows with absolute paths of utterances of these durations, not sorted."""
    return [
        {"audio_filepath": str(write_audio(folder / f"u{i}.wav", length, seed=i)), "duration": length,
         "text": f"reference number {'abcdefghijkl'[i]}", "utterance": f"u{i}", **fields}
        for i, length in enumerate(seconds)
    ]
