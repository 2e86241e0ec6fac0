"""NeMo's Conformer with attention to its neighbourhood only."""

from tests.tools.doctor.faults import Healthy
from tests.tools.doctor.setups import live, models


def make(folder):
    section = models.ENCODERS["conformer"]() | {"self_attention_model": "rel_pos_local_attn",
                                                "att_context_size": [32, 32]}
    return live(folder, section)


HEALTHY = Healthy("conformer_local_attention", "before", make)
