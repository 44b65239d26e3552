"""Coarse tiles lie in memory as kernels read them, whatever was transposed."""

import pytest
import torch

from deepseek_kernels.formats import Rows
from deepseek_kernels.gemm import gemm_add
from deepseek_train.fp8.rounding import Rounding, Tile


@pytest.mark.parametrize("tile", ["1x128", "128x128", "tensor"])
@pytest.mark.parametrize(("m", "k"), [(256, 384), (200, 130)])
def test_operands_are_contiguous(tile: Tile, m: int, k: int) -> None:
    x = torch.randn(m, k)
    for rows in (
        Rounding(tile).rows(x),
        Rounding(tile).columns(x),
        Rounding(tile).columns_of(Rounding(tile).rows(x)),
    ):
        assert rows.values.is_contiguous()
        assert rows.scales.is_contiguous()


def test_what_is_not_is_refused() -> None:
    good = Rounding().rows(torch.randn(256, 256))
    turned = Rows(good.values.t(), good.scales, 256)
    with pytest.raises(ValueError, match="make them contiguous"):
        gemm_add(good, turned, torch.zeros(256, 256), backend="reference")
