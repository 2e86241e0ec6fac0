"""NeMo's Conformer as for streaming: causal convolutions and subsampling, attention to the past, LayerNorm."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import live, models


def make(folder):
    section = models.ENCODERS["conformer"]() | {
        "causal_downsampling": True, "att_context_size": [40, 0], "conv_context_size": "causal",
        "conv_norm_type": "layer_norm"}
    return live(folder, section)


HEALTHY = Healthy("conformer_streaming", "before", make)
