"""FP8 as DeepSeek-V3 publishes it: what is taken apart and made again is the same."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek_train.checkpoint.hf_fp8 import dequantise, quantise, scale_shape


def again(w: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    first = quantise(w)
    return first, quantise(dequantise(*first))


def assert_same_bytes(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(first[0].view(torch.uint8), second[0].view(torch.uint8))
    assert torch.equal(first[1].view(torch.int32), second[1].view(torch.int32))


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 127), (200, 300), (64, 576)])
def test_block_by_block_as_written(shape: tuple[int, int]) -> None:
    """Against loops over blocks in FP64."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02
    values, scales = quantise(w)
    assert (values.dtype, values.shape) == (torch.float8_e4m3fn, w.shape)
    assert (scales.dtype, tuple(scales.shape)) == (torch.float32, scale_shape(shape))
    back = dequantise(values, scales)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            here = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            assert scales[i, j].item() == np.float32(np.float32(w[here].abs().max()) / np.float32(448))
            exact = values[here].double() * scales[i, j].double()
            assert torch.equal(back[here], exact.float())
            # 3 fraction bits; below 2^-6, steps of 2^-9. One rounding of FP32 more, of the product with 1 / scale.
            bound = (w[here].double().abs() * 2**-4).clamp(min=2**-10 * scales[i, j].item()) * (1 + 2**-10)
            assert ((exact - w[here]).abs() <= bound).all()


@settings(deadline=None, max_examples=200)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 300), st.integers(1, 300), st.floats(-45, 45), st.floats(0, 8)
)
def test_made_again_it_is_the_same(seed: int, rows: int, width: int, power: float, spread: float) -> None:
    """Over forty orders of magnitude, and blocks whose values are up to e^30 apart."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, width, generator=generator)
    w = w * torch.exp(spread * torch.randn(rows, width, generator=generator)) * 2.0**power
    assert_same_bytes(*again(w))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
@example([0.0])
@example([1e-45])
@example([3.4028234663852886e38, 1e-38])
def test_any_finite_values(values: list[float]) -> None:
    w = torch.tensor([values], dtype=torch.float32)
    assert dequantise(*quantise(w)).isfinite().all()
    assert_same_bytes(*again(w))


def test_every_largest_value_of_a_binade() -> None:
    """The claim of the module for all 2^23 mantissas: of 448 s, nothing is lost that the division does not bring back.
    Powers of two change neither rounding."""
    mantissas = torch.arange(2**23, dtype=torch.int32)
    amax = (mantissas | 0x3F800000).view(torch.float32)  # [1, 2)
    scale = amax / torch.tensor(448.0)
    assert torch.equal((scale * 448) / torch.tensor(448.0), scale)
    # What makes it more than the obvious: not so for any number.
    assert not torch.equal((amax * 448) / torch.tensor(448.0), amax)
