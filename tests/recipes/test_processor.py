"""The processor as Linux tells it."""

import pytest

from recipes import processor
from recipes.config import cpu_precision

TOLD = "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2 {}\n\nprocessor\t: 1\n"


@pytest.mark.parametrize("flags, units, precision", [
    ("", "AVX2", "32"), ("avx512f avx512vl", "AVX512", "32"), ("avx512f avx512_bf16", "AVX512-BF16", "bf16-mixed"),
    ("avx512f avx512_bf16 amx_bf16 amx_tile", "AMX", "bf16-mixed"),
])
def test_name_vector_units_and_the_precision_that_follows(flags, units, precision, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(TOLD.format(flags))
    monkeypatch.setattr(processor, "Path", lambda _: tmp_path / "cpuinfo")
    assert (processor.vector_units(), processor.processor()) == (units, f"AMD EPYC ({units})")
    assert cpu_precision() == precision


def test_where_nothing_is_told_there_is_a_name_and_the_plain_precision(tmp_path, monkeypatch):
    monkeypatch.setattr(processor, "Path", lambda _: tmp_path / "none")
    assert processor.vector_units() == "" and processor.processor() and cpu_precision() == "32"
