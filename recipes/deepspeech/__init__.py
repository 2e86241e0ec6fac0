"""DeepSpeech, the first one (Hannun et al. 2014, arXiv 1412.5567)."""

from recipes.deepspeech.encoder import DeepSpeechEncoder

__all__ = ["DeepSpeechEncoder"]
