"""DeepSpeech2 (Amodei et al. 2015, arXiv 1512.02595)."""

from recipes.deepspeech2.encoder import DeepSpeech2Encoder

__all__ = ["DeepSpeech2Encoder"]
