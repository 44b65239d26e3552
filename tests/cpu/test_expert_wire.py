"""Rows on the wire: what goes in comes out, at the price in bytes that is claimed; FP8 within the bound of its format.

Legend: N rows, D channels, K experts per token.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_kernels.formats import TILE
from deepseek_kernels.quant import dequantise as kernels_dequantise
from deepseek_kernels.quant import quantise_rows
from deepseek_train.parallel.expert.wire import (
    WireFormat,
    decode,
    dequantise,
    encode,
    fields_of,
    quantise,
)


@given(
    st.integers(0, 5),
    st.integers(1, 300),
    st.integers(1, 9),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_rows_travel_bit_by_bit(n: int, d: int, k: int, dtype: torch.dtype) -> None:
    tensors = torch.randn(n, d).to(dtype), torch.randn(n, k), torch.randn(n, 1).double()
    rows = encode(tensors, WireFormat.SAME)
    for found, sent in zip(decode(rows, fields_of(tensors), WireFormat.SAME), tensors, strict=True):
        assert found.dtype is sent.dtype
        assert torch.equal(found, sent)


def test_rows_can_be_picked_on_the_wire() -> None:
    tensors = torch.randn(6, 130).bfloat16(), torch.randn(6, 3)
    picked = torch.tensor([5, 0, 0, 2])
    for format in WireFormat:
        whole = decode(encode(tensors, format), fields_of(tensors), format)
        some = decode(encode(tensors, format)[picked], fields_of(tensors), format)
        assert all(torch.equal(a[picked], b) for a, b in zip(whole, some, strict=True))


@pytest.mark.parametrize(
    ("format", "bytes_per_row"),
    [(WireFormat.FP8, 7168 + 56 + 32), (WireFormat.BF16, 2 * 7168 + 32), (WireFormat.SAME, 2 * 7168 + 32)],
)
def test_a_row_of_v3_costs_what_is_claimed(format: WireFormat, bytes_per_row: int) -> None:
    tensors = torch.randn(3, 7168).bfloat16(), torch.randn(3, 8)
    assert encode(tensors, format).nbytes == 3 * bytes_per_row


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("magnitude", [0, -40, -90, 60])
def test_what_has_arrived_is_quantised_to_the_same_numbers(magnitude: int, dtype: torch.dtype) -> None:
    """Experts quantise what they receive: with powers of two nothing is rounded twice, however small gradients are."""
    x_ND = (torch.randn(200, 300) * 10.0 ** torch.randint(-3, 1, (200, 300)) * 2.0**magnitude).to(dtype)
    arrived = dequantise(*quantise(x_ND), dtype)
    assert (arrived != 0).float().mean() > 0.9
    rows = quantise_rows(arrived, pow2=True, backend="reference")
    assert torch.equal(kernels_dequantise(rows, torch.float32, backend="reference"), arrived.float())
    sent = quantise_rows(x_ND, pow2=True, backend="reference")
    assert torch.equal(kernels_dequantise(sent, torch.float32, backend="reference"), arrived.float())


@given(st.integers(1, 4), st.integers(1, 400), st.integers(-30, 30), st.integers(0, 2**31))
def test_fp8_errs_by_no_more_than_half_a_step(n: int, d: int, magnitude: int, seed: int) -> None:
    """E4M3 has 3 bits behind the point and steps of 2^-9 below 2^-6: an error of |x| / 16, or scale / 1024."""
    spread = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    x_ND = spread * 10.0 ** torch.randint(-4, 1, (n, d)) * 2.0**magnitude
    values, exponents = quantise(x_ND)
    scale_ND = torch.exp2(exponents.float() - 127).repeat_interleave(TILE, 1)[:, :d]
    error = (dequantise(values, exponents, torch.float64) - x_ND.double()).abs()
    assert (error <= torch.maximum(x_ND.double().abs() / 16, scale_ND.double() / 1024)).all()


def test_scales_are_the_next_power_of_two() -> None:
    """amax / 448, rounded up: 448 itself and its multiples by powers of two are exact, a little more takes the next."""
    x_ND = torch.zeros(4, TILE)
    x_ND[:, 3] = torch.tensor([448.0, 448.0 * 2**-9, 449.0, 0.0])
    values, exponents = quantise(x_ND)
    assert (exponents.flatten()[:3] - 127).tolist() == [0, 247, 1]  # unsigned: 247 is -9
    assert torch.equal(dequantise(values, exponents, torch.float32)[:2], x_ND[:2])
    assert values.float().abs().max() <= 448
    assert torch.equal(dequantise(values, exponents, torch.float32)[3], x_ND[3])


@pytest.mark.parametrize("strange", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_does_not_vanish(strange: float) -> None:
    """An Inf takes its tile with it; a NaN stays one, alone."""
    x_ND = torch.randn(2, 2 * TILE)
    x_ND[1, 5] = strange
    found = dequantise(*quantise(x_ND), torch.float32)
    assert not found[1, 5].isfinite()
    assert found[1, :TILE].isfinite().sum() == (TILE - 1 if math.isnan(strange) else 0)
    assert found[0].isfinite().all()
    assert found[1, TILE:].isfinite().all()
