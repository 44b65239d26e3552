"""Quantisation: every backend bit for bit the reference, and the reference by its definition."""

import pytest
import torch

from deepseek_kernels.quant import quantise_rows
from tests.gpu.setting import backends, randn, same_bits, size

SIZES = [(size(4096, 37), size(7168, 384)), (1, 128), (5, 200), (129, 64), (0, 256)]


@pytest.mark.parametrize("backend", backends("triton"))
@pytest.mark.parametrize("pow2", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("m", "k"), SIZES)
def test_rows_are_the_references(m: int, k: int, dtype: torch.dtype, pow2: bool, backend: str) -> None:
    x = randn(m, k, dtype=dtype, spread=3.0)
    ours = quantise_rows(x, pow2=pow2, backend=backend)
    expected = quantise_rows(x, pow2=pow2, backend="reference")
    assert same_bits(ours.values, expected.values)
    assert same_bits(ours.scales, expected.scales)
    assert ours.width == k
